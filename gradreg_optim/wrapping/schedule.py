"""Strength over time: nothing during the warm-up, then a factor that multiplies every group's strength.

Zhao et al. 2024 find that a penalty at full strength during the learning-rate warm-up of an adaptive
optimizer can hurt, and that letting it grow repairs this: ``"linear"`` and ``"cosine"`` therefore
*rise*, from 0 to 1.
"""

import math
from collections.abc import Callable
from typing import Literal, get_args

Schedule = Callable[[int], float]
ScheduleName = Literal["constant", "linear", "cosine"]

NAMES: tuple[str, ...] = get_args(ScheduleName)


def strength_factor(
    step: int,
    *,
    warmup_steps: int = 0,
    schedule: str | Schedule | None = None,
    schedule_steps: int | None = None,
) -> float:
    """The factor on the strength at optimizer step ``step``.

    Args:
        step: optimizer steps taken so far; the first step has number 0.
        warmup_steps: steps at the beginning during which the factor is 0.
        schedule: ``None`` or ``"constant"``: 1. ``"linear"``, ``"cosine"``: from 0 to 1 over the
            ``schedule_steps`` steps that follow the warm-up, then 1. A callable: its value at ``step`` (like
            ``LambdaLR``, it multiplies).
        schedule_steps: length of the rise, in optimizer steps; needed by ``"linear"`` and ``"cosine"``.

    Raises:
        ValueError: a callable returned something that is not a finite number ≥ 0, or the length is missing.

    >>> [strength_factor(step, warmup_steps=1, schedule="linear", schedule_steps=4) for step in range(6)]
    [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    """
    if step < warmup_steps:
        return 0.0
    if callable(schedule):
        factor = float(schedule(step))
        if not 0.0 <= factor < math.inf:
            raise ValueError(
                f"schedule({step}) returned {factor}: a factor on the strength must be a finite number >= 0. "
                "Correct the callable."
            )
        return factor
    if schedule in (None, "constant"):
        return 1.0
    if schedule_steps is None:
        raise ValueError(
            f"schedule_steps is None: schedule {schedule!r} must know over how many steps it rises. "
            "Pass schedule_steps=<int> (in a trainer the default is its number of steps)."
        )
    progress = min(1.0, (step - warmup_steps + 1) / schedule_steps)
    return progress if schedule == "linear" else (1.0 - math.cos(math.pi * progress)) / 2.0
