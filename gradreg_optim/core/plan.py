"""What a step is to do: its settings, and the scheme that estimates H·d."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gradreg_optim.core.step import Difference, FirstGradient, Point, Scalar
from gradreg_optim.core.storage import Storage

START = 0.005
"""The radius of a first step whose radius adapts; that step is checked."""


@dataclass(frozen=True)
class Scheme:
    """At which points gradients are taken, and what Δ is. Kinds: forward, central.

    Args:
        points: where gradients are taken after θ; the combined gradient is written over the last one.
        checked_points: the same in the step of a check.
        difference: ``difference(storage, first, plan)`` measures Δ from the gradients in ``first``.
        noise: the rounding errors of Δ, in units of those of a difference of two gradients.
        sufficient: the self-check below which a user is warned.
        order: the power of ε in the error that changing curvature makes in Δ/ε.
    """

    points: tuple[Point, ...]
    checked_points: tuple[Point, ...]
    difference: Callable[[Storage, FirstGradient, Plan], Difference]
    noise: float
    sufficient: float
    order: int = 1


@dataclass(frozen=True)
class Settling:
    """What is known about a γ that is to be found (:mod:`gradreg_optim.core.strength`).

    That is the ``total`` of the ratios ‖penalty‖/‖g1‖ for γ = 1, and the ``count`` of gradients that they are
    from. ``groups`` says which parameter groups get this γ.
    """

    groups: tuple[bool, ...]
    total: Scalar = 0.0
    count: Scalar = 0.0


@dataclass(frozen=True)
class Plan:
    """The settings of one step, read from the parameter groups and validated once.

    ``strengths``, ``eps`` and ``radius`` hold one value a group; a strength already contains the schedule's
    factor, and a group of strength 0 is not regularized. Where γ is to be found, a strength is that factor
    alone, and ``settling`` what is known about γ. A radius of ``"auto"`` is ``auto_radius`` in this
    step. Without ``eps`` and ``radius`` it is the precision that decides between them
    (:mod:`gradreg_optim.core.precision`). ``points`` are those where gradients are taken after θ, none in a
    step without penalty. ``excluded`` holds the positions of parameters that are left out of their group.
    ``is_low``: whether the passes have fewer bits than float32; ``None``: not yet known. ``floor`` is the
    noise floor last measured. ``is_check_asked``: the user set ``check_every``. ``step``, the number of the
    step, seeds stochastic rounding.
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
    is_check_asked: bool
    is_low: bool | None = None
    floor: float | None = None
    auto_radius: Scalar = START
    settling: Settling | None = None

    @property
    def regularizes(self) -> bool:
        """Whether this step takes gradients at further points."""
        return bool(self.points)

    @property
    def is_checked(self) -> bool:
        """Whether this step is one of a check."""
        return len(self.points) > len(self.scheme.points)
