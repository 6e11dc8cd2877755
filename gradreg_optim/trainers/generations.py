"""Trainers that generate, score and differentiate in one ``training_step``: OnlineDPO, and NashMD and XPO on top of it.

There the second pass repeats the whole step. What the first pass generated, scored or judged is returned again, with the
random numbers as they then stood, so that nothing is generated or rewarded twice. Only the reference model, whose weights
do not move, gives its log-probabilities a second time.

Relied upon (trl 0.27 to 1.16): the names of the class and of the methods below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from gradreg_optim.core.repeatable import RandomState

_KINDS = ("OnlineDPOTrainer",)
_RECORDED = (
    "_prepare_inputs",
    "_generate",
    "_generate_vllm",
    "_generate_completions",
    "_calculate_rewards_from_functions",
    "_compute_rewards",
    "_compute_judge",
)

Recorded = tuple[Any, RandomState]


def recorded_methods(trainer: Any) -> list[tuple[Any, str]]:
    """Owners and names of the methods whose results are used again; none if the trainer is of another kind."""
    if not any(kind.__name__ in _KINDS for kind in type(trainer).__mro__):
        return []
    judge = getattr(trainer, "judge", None)
    return [(trainer, name) for name in _RECORDED if hasattr(trainer, name)] + ([(judge, "judge")] if judge else [])


class Generations:
    """Stands before those methods: records what they return in the first pass, and returns it in the second."""

    def __init__(self, devices: Callable[[], set[torch.device]]) -> None:
        self._devices = devices
        self._kept: list[Recorded] | None = None
        self._again: Iterator[Recorded] | None = None

    def record(self, kept: list[Recorded] | None) -> None:
        """Append to ``kept`` from now on; ``None``: to nothing."""
        self._kept, self._again = kept, None

    def repeat(self, kept: list[Recorded]) -> None:
        """Return what ``kept`` holds from now on, in its order."""
        self._kept, self._again = None, iter(kept)

    def __call__(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What ``method`` returns, or returned in the first pass."""
        if self._again is not None:
            result, random = next(self._again)
            random.restore()
            return _cloned(result)
        kept, self._kept = self._kept, None  # methods may call one another: the outermost one's result counts
        try:
            result = method(*args, **kwargs)
        finally:
            self._kept = kept
        if kept is not None:
            kept.append((_cloned(result), RandomState(self._devices())))
        return result


def _cloned(value: Any) -> Any:
    """A copy down to the tensors: penalties are subtracted from rewards in place."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _cloned(item) for key, item in value.items()}
    return type(value)(map(_cloned, value)) if type(value) in (list, tuple) else value
