"""Optimizers that cannot be wrapped, each with the reason and a way out."""

from __future__ import annotations

import inspect
from typing import Any

from torch.optim import Optimizer


def check_wrappable(optimizer: Any) -> None:
    """Refuse what cannot be wrapped, before anything is changed."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer={optimizer!r} is a {type(optimizer).__name__}: an instance of torch.optim.Optimizer is wrapped. "
            "Pass, for example, torch.optim.AdamW(model.parameters())."
        )
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"optimizer={type(optimizer).__name__}: its step needs a closure of its own, but the combined gradient "
            "exists at one point only. Use an optimizer that steps on gradients, such as AdamW or SGD."
        )
