"""The one call upwards: trainers, in a package that imports this one, have to use the wrapper they are given.

That package is imported by name, and only once Transformers' trainer is there: ``import gradreg_optim`` needs
torch alone. A scaler that calls the wrapper is found in the calling frames.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from torch.amp import GradScaler

TRAINER = "transformers.trainer"
ATTACH = "gradreg_optim.trainers.attach"


def announce() -> None:
    """There is a wrapper, and there are trainers: let them use those that they are given."""
    # Else it is in the middle of its import.
    if not getattr(sys.modules[TRAINER].__spec__, "_initializing", False):
        import_module(ATTACH)


def calling_scaler() -> Any:
    """The enabled ``GradScaler`` that calls the step; ``None`` if there is none."""
    frame, depth = sys._getframe(1), 0
    # There are two frames of torch's hooks in between, and one of each LR scheduler.
    while frame is not None and depth < 12:
        scaler = frame.f_locals.get("self")
        if isinstance(scaler, GradScaler) and scaler.is_enabled():
            return scaler
        frame, depth = frame.f_back, depth + 1  # type: ignore[assignment]
    return None


def check_scaler(known: Any) -> None:
    """Raise ``RuntimeError`` if an unknown ``GradScaler`` calls the step: the gradients were scaled."""
    if calling_scaler() not in (None, known):
        raise RuntimeError(
            "scaler.step(optimizer): the optimizer does not know this scaler, and took scaled "
            "gradients for gradients. Pass GradRegOptimizer(..., scaler=scaler), and call "
            "optimizer.step() and scaler.update()."
        )
