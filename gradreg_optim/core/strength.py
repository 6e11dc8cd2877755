"""``strength="auto"``: the γ at which the penalty has a given length beside the gradient, over ten steps.

In each of the first ``STEPS`` regularized steps

    γ = AIM / mean of u        u = ‖Δ‖/(ε·‖g1‖)

where u is the length of the penalty, relative to g1, for each unit of γ. The mean is over the gradients so
far, the present one included. Then γ stays: a penalty of the same ratio in *every* step protects from
nothing, because the steps that matter are those in which it is large.

Nine settings of γ that were tuned by hand had mean ratios of 0.33 to 0.67 in the first steps, and of 1 to 2
without a KL penalty against a learned reward. Three times more did little harm. With 0.7 the laboratory of
reward hacking met all its bars, with 1 all but one
(benchmarks/results/2026-12-01-defaults-in-the-laboratory).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gradreg_optim.core.plan import Settling
from gradreg_optim.core.schemes import is_finite, item_on_cpu, ratio, stack_scalars
from gradreg_optim.core.step import Difference, FirstGradient, Scalar
from gradreg_optim.core.storage import Storage

STEPS = 10
AIM = 0.7
SIGNAL = 0.5
"""Share of signal below which a difference is rounding noise, which says nothing about γ."""


def strength_so_far(settling: Settling) -> Scalar:
    """γ; 0 until there is a gradient with curvature."""
    if isinstance(settling.total, Tensor):
        return ratio(AIM * settling.count, settling.total)
    return AIM * settling.count / settling.total if settling.total else 0.0


def first_strength(strengths: Sequence[float], settling: Settling | None) -> Scalar:
    """The strength of the first regularized group."""
    number = next(number for number, strength in enumerate(strengths) if strength)
    is_auto = settling is not None and settling.groups[number]
    return strengths[number] * (strength_so_far(settling) if is_auto else 1.0)  # type: ignore[arg-type]


def settle(
    settling: Settling, storage: Storage, first: FirstGradient, delta: Difference, signal: Tensor | None
) -> Settling:
    """Take in the u of this difference."""
    chosen = stack_scalars([float(is_auto) for is_auto in settling.groups], delta.squares)
    lengths = ratio(
        delta.squares, stack_scalars([group.eps for group in first.groups], delta.squares).square()
    )
    u = ratio((chosen * lengths).sum(), (chosen * first.g1_squared).sum()).sqrt()
    counts = is_finite(u) & (u > 0)
    if signal is not None:
        counts = counts & (signal >= SIGNAL)
    return with_others(settling, storage, torch.stack([torch.where(counts, u, 0.0), counts.to(u.dtype)]))


def with_others(settling: Settling, storage: Storage, own: Tensor) -> Settling:
    """Add this rank's ``own`` u and its count, and those of ranks whose gradients are not reduced yet."""
    total, count = storage.sum_over_replicas(own).to(own.device).unbind()
    return replace(
        settling, total=item_on_cpu(settling.total + total), count=item_on_cpu(settling.count + count)
    )
