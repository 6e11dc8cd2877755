"""The one arrow upwards: a wrapper that a trainer drives finds its trainer, in a package that imports this one.

Modules are imported by name, and only once Transformers is there: ``import gradreg_optim`` needs torch alone. A scaler that
calls the wrapper is found in the same way.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from torch.amp import GradScaler


def announce() -> None:
    """A wrapper was built: Transformers' DeepSpeed integration has to be told that there are any."""
    if "transformers.trainer" in sys.modules:
        import_module("gradreg_optim.trainers.attach")


def attach_to_caller(optimizer: Any) -> None:
    """Let a trainer whose ``training_step`` is calling know the optimizer; do nothing if there is none."""
    if "transformers" in sys.modules:
        import_module("gradreg_optim.trainers.attach").attach_to_caller(optimizer)


def check_scaler(known: Any) -> None:
    """Raise ``RuntimeError`` if a ``GradScaler`` calls the step and is not the one that is known: gradients were scaled."""
    frame, depth = sys._getframe(1), 0
    while frame is not None and depth < 10:  # torch has two frames of hooks in between, and each LR scheduler one
        scaler = frame.f_locals.get("self")
        if isinstance(scaler, GradScaler) and scaler is not known and scaler.is_enabled():
            raise RuntimeError(
                "scaler.step(optimizer): the optimizer does not know this scaler, and took scaled gradients for gradients. "
                "Pass GradRegOptimizer(..., scaler=scaler), and call optimizer.step() and scaler.update()."
            )
        frame, depth = frame.f_back, depth + 1  # type: ignore[assignment]
