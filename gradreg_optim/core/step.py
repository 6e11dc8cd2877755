"""The records of one step: what was found at θ, how the gradients differ, and what came out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor

Scalar = float | Tensor
"""A Python number, or a 0-d tensor that nobody has read yet."""

Figure = Scalar | Callable[[], Tensor]
"""A scalar, or how to compute it, if anybody asks: on a GPU each operation on scalars is a kernel launch."""

Gradients = list[list[Tensor]]
"""One list of tensors a parameter group, laid out like :attr:`GroupGradients.g1`."""


_zero = partial(torch.zeros, ())


def computed(figure: Figure) -> Scalar:
    """The figure itself."""
    return figure() if callable(figure) else figure


class Point(Enum):
    """Where a gradient is taken; the number is the distance from θ in units of the step ε·d."""

    THETA = 0.0
    AHEAD = 1.0
    BEHIND = -1.0
    SIDEWAYS = "θ + ε·(±d)"
    """θ + ε·d̃, where d̃ is d with its elements in other places: as much rounding, and little curvature."""


class OfOneOptimizer:
    """A copy of the optimizer begins with a new one."""

    def __reduce__(self) -> Any:
        return type(self), ()


@dataclass
class GroupGradients:
    """One parameter group's regularized tensors, and what is known about them so far.

    ``g1`` and ``weights`` are what the arithmetic runs on: flat or shaped, real, local to this
    process. ``counts`` says which of them this rank adds to sums over ranks; ``None``: all. ``eps`` is
    ε in this step. ``moved_along`` and ``step_squared`` are ⟨θ'_real − θ, g1⟩ and ‖g1‖² of g1 as it
    came, perhaps on a sample.
    """

    strength: float
    eps: Scalar = 0.0
    g1: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    counts: list[bool] | None = None
    moved_along: Scalar = 0.0
    step_squared: Scalar = 0.0

    def counted(self, tensors: list[Tensor]) -> list[Tensor]:
        """Those of ``tensors``, laid out like g1, that this rank adds to sums over ranks."""
        if self.counts is None:
            return tensors
        return [tensor for tensor, counts in zip(tensors, self.counts, strict=True) if counts]


@dataclass
class FirstGradient:
    """g1, out of reach of the next backward, and the gradients that were taken at further points.

    ``figures`` are what is to be logged about g1 and ε, ``skipped`` is 1 if the penalty is left out. ``norm``
    is ‖g1‖ over all groups and ranks, before the clip by the factor ``clip``, and ``g1_squared`` ‖d‖² of each
    group. ``is_low``: the passes have fewer bits than float32. ``taken`` are gradients of further points as
    the storage keeps them, ``further`` the same, laid out like g1. ``noise`` is ‖g − g1‖² of the gradients g
    at :attr:`Point.SIDEWAYS`, over this rank's tensors. ``auto_radius`` is the radius, if it adapts, and
    ``next_radius`` that of the next step. ``losses`` holds this rank's share of the change of the loss from θ
    to θ' and of its size; nothing if they are not known. ``is_frozen_again``: the pass trained a parameter
    and froze it again, as closures of GANs do, which run other models too: such a step is not checked.
    """

    groups: list[GroupGradients]
    figures: dict[str, Figure] = field(default_factory=dict)
    skipped: Scalar = 0
    norm: Tensor = field(default_factory=_zero)
    clip: Scalar = 1.0
    g1_squared: Tensor = field(default_factory=_zero)
    is_low: bool = False
    is_frozen_again: bool = False
    taken: dict[Point, Any] = field(default_factory=dict)
    further: dict[Point, Gradients] = field(default_factory=dict)
    noise: Scalar | None = None
    auto_radius: Scalar | None = None
    next_radius: Scalar | None = None
    losses: list[Scalar] = field(default_factory=list)


@dataclass
class Difference:
    """Δ, which stands for ε·H·d, and its moments over all ranks.

    ``inner`` is ⟨Δ, d⟩, ``squares`` ‖Δ‖² and ``ahead`` ⟨g2, d⟩ before g2 is clipped, one number a group.
    ``written`` are the tensors from which the wrapped optimizer will step: they hold Δ itself if
    ``is_delta``, else g2, of which Δ = clip·g2 − d. ``losses`` are the change of the loss and its size, over
    all ranks, if they are known.
    """

    inner: Tensor
    squares: Tensor
    ahead: Tensor
    written: Gradients
    is_delta: bool
    is_finite: Scalar
    losses: Tensor | None = None
    clip: Scalar = 1.0
    figures: dict[str, Figure] = field(default_factory=dict)


@dataclass
class Check:
    """What the step of a check measured, in Python numbers.

    ``advice`` is the warning for the user if the self-check is low. ``is_swallowed``: the arithmetic rounded
    the step away, so that ``floor`` is not that of later steps.
    """

    self_check: float
    floor: float
    advice: str | None
    is_swallowed: bool = False


@dataclass
class Outcome:
    """What a step did: its figures for ``metrics``, whether the penalty was left out, and what a check found.

    ``is_empty``: the first pass left no gradient on any parameter that is to be regularized. ``is_low``:
    whether the passes have fewer bits than float32, if this step found out. ``auto_radius``: that of the next
    step, if it adapts. ``settling``: what is known about γ, if it is to be found. ``symptoms``: what
    :class:`~gradreg_optim.core.witnesses.Witnesses` goes by; ``is_disproved``: they are to be read now.
    """

    figures: dict[str, Figure]
    skipped: Scalar = 0
    check: Check | None = None
    is_empty: bool = False
    is_low: bool | None = None
    auto_radius: Scalar | None = None
    settling: Any = None
    symptoms: Callable[[], Tensor] | None = None
    is_disproved: bool = False


def averaged(outcomes: Sequence[Outcome]) -> Outcome:
    """The outcome of a step whose micro-batches had these ``outcomes``: figures and symptoms are means."""
    names = {name: None for outcome in outcomes for name in outcome.figures}
    symptoms = [outcome.symptoms for outcome in outcomes if outcome.symptoms is not None]
    return Outcome(
        {name: _mean([o.figures[name] for o in outcomes if name in o.figures]) for name in names},
        skipped=sum(outcome.skipped for outcome in outcomes) / len(outcomes),
        check=next((outcome.check for outcome in outcomes if outcome.check is not None), None),
        is_empty=all(outcome.is_empty for outcome in outcomes),
        symptoms=partial(_mean_of, symptoms) if symptoms else None,
        is_disproved=any(outcome.is_disproved for outcome in outcomes),
    )


def _mean(figures: list[Figure]) -> Figure:
    if any(callable(figure) or isinstance(figure, Tensor) for figure in figures):
        return partial(_mean_of, figures)
    return sum(figures) / len(figures)  # type: ignore[arg-type]


def _mean_of(figures: Sequence[Figure]) -> Tensor:
    values = [computed(figure) for figure in figures]
    like = next(value for value in values if isinstance(value, Tensor))
    like = like.to(torch.promote_types(like.dtype, torch.float32))
    numbers = [
        value.to(like) if isinstance(value, Tensor) else torch.full_like(like, value) for value in values
    ]
    return torch.stack(numbers).mean(0)
