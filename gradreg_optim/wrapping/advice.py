"""What a user is told once about a run that goes on: the difference is noise, the penalty swamps the gradient, and so on."""

from __future__ import annotations

import warnings
from collections import deque

from torch import Tensor

from gradreg_optim.core.step import Figure, Outcome, computed

MANY_STEPS = 20
MUCH = 10.0


class Advice:
    """Warns once of each kind of trouble. Ratios on a device are read in the steps of a check and when a trainer logs."""

    def __init__(self) -> None:
        self._ratios: deque[Figure] = deque(maxlen=MANY_STEPS)
        self._is_told: set[str] = set()

    def note(self, outcome: Outcome) -> None:
        """Say what there is to say about a step."""
        if outcome.check is not None and outcome.check.advice is not None:
            self.tell("check", outcome.check.advice)
        if "penalty_ratio" in outcome.figures:
            self._ratios.append(outcome.figures["penalty_ratio"])
            norm = outcome.figures.get("g1_norm")
            if outcome.check is not None or (isinstance(norm, Tensor) and norm.device.type == "cpu"):
                self.look_at_ratios()

    def look_at_ratios(self) -> None:
        """Warn if the penalty was much longer than the gradient for many steps. Waits for the device."""
        if len(self._ratios) == MANY_STEPS and "ratio" not in self._is_told:
            least = min(float(computed(ratio)) for ratio in self._ratios)
            self._ratios.clear()
            if least > MUCH:
                self.tell(
                    "ratio",
                    f"Gradient regularization: in each of {MANY_STEPS} steps the penalty was at least {least:.3g} times as "
                    "long as the gradient (penalty_ratio), which it swamps. Lower strength until the ratio is near 0.3, or "
                    "bound it by max_penalty_ratio.",
                )

    def tell(self, topic: str, message: str) -> None:
        """Warn, unless that has been done."""
        if topic not in self._is_told:
            self._is_told.add(topic)
            warnings.warn(message, stacklevel=4)
