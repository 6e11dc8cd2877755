"""The usual closure, called in each pass of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from gradreg_optim.core.losses import Losses


def call_in_each(
    closure: Callable[[], Any], passes: Iterable[Any], noting: Losses | None, calling_scaler: Callable[[], Any]
) -> tuple[Any, bool]:
    """Call ``closure`` in each pass; returns the loss at θ, and whether all passes ran.

    Composer's scaler hands over a closure that unscales, and returns ``None`` after an overflow on any rank: then no further
    pass is run. Elsewhere a closure that returns no loss means nothing.
    """
    call, losses = torch.enable_grad()(closure), list[Any]()
    for _ in passes:
        losses.append(call() if noting is None else noting.returned(call()))
        if losses[-1] is None and calling_scaler() is not None:
            return None, False
    return losses[0], True
