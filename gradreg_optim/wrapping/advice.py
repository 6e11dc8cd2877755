"""What a user is told once about a run that goes on: the difference is noise, or the penalty swamps the gradient."""

from __future__ import annotations

import warnings

from gradreg_optim.core.step import Check, Scalar

MANY_STEPS = 20
"""Regularized steps whose ratios are read at once: where they are on a device, that waits for it."""
MUCH = 10.0


class Advice:
    """Warns once of a low self-check, and once of a penalty that is much longer than the gradient."""

    def __init__(self) -> None:
        self.ratios: list[Scalar] = []  # of the last steps; nobody has read them
        self._is_told: set[str] = set()

    def __call__(self, check: Check | None) -> None:
        """Say what there is to say about the last check and the last ratios."""
        if check is not None and check.advice is not None:
            self._tell("check", check.advice)
        if len(self.ratios) < MANY_STEPS:
            return
        if "ratio" not in self._is_told and (least := min(map(float, self.ratios))) > MUCH:
            self._tell(
                "ratio",
                f"Gradient regularization: in each of {MANY_STEPS} steps the penalty was at least {least:.3g} times as long "
                "as the gradient (penalty_ratio), which it swamps. Lower strength until the ratio is near 0.3, or bound it "
                "by max_penalty_ratio.",
            )
        self.ratios = []

    def _tell(self, topic: str, message: str) -> None:
        if topic not in self._is_told:
            self._is_told.add(topic)
            warnings.warn(message, stacklevel=4)
