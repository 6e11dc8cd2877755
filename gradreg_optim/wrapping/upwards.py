"""The one arrow upwards: trainers have to use a wrapper that they are given, in a package that imports this one.

That package is imported by name, and only once Transformers' trainer is there: ``import gradreg_optim`` needs torch alone.
A scaler that calls the wrapper is found in the calling frames.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from torch.amp import GradScaler

_TRAINER = "transformers.trainer"
_ATTACH = "gradreg_optim.trainers.attach"


def announce() -> None:
    """There is a wrapper: if there are trainers, let them use those that they are given."""
    if _TRAINER in sys.modules and _ATTACH not in sys.modules:
        trainer = sys.modules[_TRAINER]
        if not getattr(trainer.__spec__, "_initializing", False):  # else the module is in the middle of its import
            import_module(_ATTACH)


def calling_scaler() -> Any:
    """The enabled ``GradScaler`` that calls the step; ``None`` if there is none."""
    frame, depth = sys._getframe(1), 0
    while frame is not None and depth < 12:  # torch has two frames of hooks in between, and each LR scheduler one
        scaler = frame.f_locals.get("self")
        if isinstance(scaler, GradScaler) and scaler.is_enabled():
            return scaler
        frame, depth = frame.f_back, depth + 1  # type: ignore[assignment]
    return None


def check_scaler(known: Any) -> None:
    """Raise ``RuntimeError`` if a ``GradScaler`` calls the step and is not the one that is known: gradients were scaled."""
    if calling_scaler() not in (None, known):
        raise RuntimeError(
            "scaler.step(optimizer): the optimizer does not know this scaler, and took scaled gradients for gradients. "
            "Pass GradRegOptimizer(..., scaler=scaler), and call optimizer.step() and scaler.update()."
        )
