"""What a step is to do: its settings, and the scheme that estimates H·d."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from gradreg_optim.core.radius import START
from gradreg_optim.core.step import Difference, FirstGradient, GroupGradients, Point, Scalar
from gradreg_optim.core.storage import Storage


@dataclass(frozen=True)
class Scheme:
    """At which points gradients are taken, and what Δ is. Kinds: forward, central, exact.

    Args:
        points: where gradients are taken after θ; the combined gradient is written over the last one.
        checked_points: the same in the step of a check.
        at: ``at(storage, first, point, plan)`` lets a block take gradients at the point.
        difference: ``difference(storage, first, plan)`` measures Δ from the gradients in ``first``.
        weight: the factor with which a group's Δ is added to its g1.
        noise: the rounding errors of Δ, in units of those of a difference of two gradients; ``None`` if it is none.
        sufficient: the self-check below which a user is warned.
        order: the power of ε in the error that changing curvature makes in Δ/ε.
    """

    points: tuple[Point, ...]
    checked_points: tuple[Point, ...]
    at: Callable[[Storage, FirstGradient, Point, Plan], AbstractContextManager[None]]
    difference: Callable[[Storage, FirstGradient, Plan], Difference]
    weight: Callable[[GroupGradients], Scalar]
    noise: float | None = None
    sufficient: float = 0.0
    order: int = 1


@dataclass(frozen=True)
class Plan:
    """The settings of one step, read from the parameter groups and validated once.

    ``strengths``, ``eps`` and ``radius`` hold one value a group; a strength already contains the schedule's factor, and a
    group of strength 0 is not regularized. A radius of ``"auto"`` is ``auto_radius`` in this step; in full precision only
    where there is no ``eps``, as ``is_always_auto`` tells. ``points`` are those where gradients are taken after θ, none in a
    step without penalty. ``excluded`` holds the positions of parameters that are left out of their group. ``floor`` is the
    noise floor last measured. ``step``, the number of the step, seeds stochastic rounding. ``points_if_low`` take the place
    of ``points`` if the first pass turns out to compute in half precision; none if that does not matter. ``low_dtype`` is
    the dtype of the passes, if it is known to have fewer bits than float32.
    """

    step: int
    strengths: tuple[float, ...]
    excluded: tuple[frozenset[int], ...]
    eps: tuple[float | None, ...]
    radius: tuple[float | str | None, ...]
    g1_clip: float | None
    g2_clip: float | None
    max_penalty_ratio: float | None
    scheme: Scheme
    points: tuple[Point, ...]
    rounds_to_nearest: bool
    shrinks: bool
    fraction: float
    floor: float | None
    auto_radius: Scalar = START
    is_always_auto: bool = False
    points_if_low: tuple[Point, ...] = ()
    low_dtype: torch.dtype | None = None

    @property
    def regularizes(self) -> bool:
        """Whether this step takes gradients at further points."""
        return bool(self.points)
