"""The schemes by the names that ``method`` gives them."""

from __future__ import annotations

from torch import nn

from gradreg_optim.core.exact import exact
from gradreg_optim.core.finite_difference import CENTRAL, FORWARD
from gradreg_optim.core.plan import Scheme

METHODS = ("forward", "central", "exact")


def scheme_of(method: str, model: nn.Module | None) -> Scheme:
    """The scheme called ``method``."""
    return {"forward": FORWARD, "central": CENTRAL}.get(method) or exact(model)
