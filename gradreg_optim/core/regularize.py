"""The algorithm: one generator, which yields wherever a gradient is wanted.

Objective (Ackermann et al. 2026, arXiv 2602.18037; Karakida et al. 2023, arXiv 2210.02720)

    L(θ) + (γ/2)·‖∇L(θ)‖²        with gradient        ∇L + γ·H∇L

Estimator

    g1 = ∇L(θ)        d = clip(g1)        θ' = θ + ε·d        g2 = ∇L(θ')        Δ = clip(g2) − d
    g  = d + (γ/ε)·Δ

Whoever drives the generator runs forward and backward at each point. Where gradients and weights are kept is
the business of a :class:`~gradreg_optim.core.storage.Storage`; what Δ is, that of a
:class:`~gradreg_optim.core.plan.Scheme`.

Symbols in the code: ``strength`` is γ, ``eps`` is ε, ``radius`` is ρ = ‖θ' − θ‖ = ε·‖d‖, ``weight`` is γ/ε.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gradreg_optim.core import multi_tensor
from gradreg_optim.core.foreign import NoSecondGradient
from gradreg_optim.core.plan import Plan, Settling
from gradreg_optim.core.precision import (
    AUTO,
    PUBLISHED_EPS,
    following,
    inner_of_differences,
    is_low,
    longer,
    run_check,
    signal_fraction,
)
from gradreg_optim.core.schemes import (
    clip_coefficient,
    is_finite,
    item_on_cpu,
    ratio,
    stack_scalars,
)
from gradreg_optim.core.step import (
    Check,
    Difference,
    Figure,
    FirstGradient,
    GroupGradients,
    Outcome,
    Point,
    Scalar,
)
from gradreg_optim.core.storage import Storage
from gradreg_optim.core.strength import first_strength, settle, strength_so_far
from gradreg_optim.core.witnesses import BEYOND, Evidence, Losses

NEARBY = 0.01
"""In full precision the step sideways is this multiple of the step ahead instead."""


@torch.no_grad()
def regularized(storage: Storage, plan: Plan, losses: Losses) -> Generator[Point, None, Outcome]:
    """Replace the gradient g1 that ``storage`` holds after the first pass by g1 + (γ/ε)·Δ.

    Yields each point at which a gradient is wanted, θ first. In a first step θ comes twice if the first pass
    wrote weights, and the last point twice if the ``losses`` are suspicious. If the driver closes the
    generator at a point, or throws into it, the weights are at θ, bit for bit, and g1 is back.
    """
    yield Point.THETA
    if not plan.points:
        return Outcome({"strength": 0.0})
    storage.check_first_pass()
    if storage.first_pass_moved:
        storage.take_sum()  # and drop it: it is taken once more, at the weights as they are now
        yield Point.THETA
    first = storage.take(plan.strengths, plan.excluded)
    first.figures["strength"] = next(filter(None, plan.strengths))
    if plan.settling is not None:
        first.figures["strength"] = first_strength(plan.strengths, plan.settling)
    try:
        if not storage.has_gradient(first):
            storage.put_back(first)
            return Outcome(first.figures, is_empty=True)
        if not choose_step(storage, first, plan):  # d = clip(g1), ε; False: there is no finite gradient
            storage.put_back(first)
            return Outcome(first.figures, first.skipped)
        points = plan.scheme.points if first.is_frozen_again else plan.points
        for point in points:  # usually one
            with stand_at(storage, first, point, plan):  # θ' = θ + ε·d inside, θ again after it
                yield point
                if losses.is_integral is None and point is points[-1] and losses.are_far(storage, first):
                    storage.take_sum()  # and drop it: it is taken once more
                    yield point
                    losses.require_same(storage)
            collect(storage, first, point, plan)
        first.losses = losses.change(storage)
        check = None if first.noise is None else run_check(storage, first, plan)
        delta = plan.scheme.difference(storage, first, plan)
        weights, figures, settling = penalty(storage, first, delta, plan, check)
        evidence, is_disproved = prove(first, delta, losses, weights, figures)
        combine_(storage, first, delta, weights)
    except NoSecondGradient:
        storage.abandon(first)
        if not losses.last_was_skipped():
            raise
        return Outcome(first.figures, 1)
    except BaseException:
        storage.abandon(first)
        raise
    return Outcome(
        first.figures | delta.figures | figures,
        first.skipped,
        check,
        is_low=first.is_low,
        auto_radius=first.next_radius,
        settling=settling,
        symptoms=evidence.symptoms,
        is_disproved=is_disproved,
    )


def choose_step(storage: Storage, first: FirstGradient, plan: Plan) -> bool:
    """Find ‖g1‖, the factor that clips it, and ε; False if ‖g1‖ is known not to be finite."""
    scale = storage.loss_scale
    local = stack_scalars([multi_tensor.norm_squared(group.counted(group.g1)) for group in first.groups])
    squares = storage.sum_over_ranks(local)
    if scale != 1:
        squares = squares / scale**2
    norm = squares.sum().sqrt()
    is_known_finite = item_on_cpu(is_finite(norm))
    coefficient = clip_coefficient(norm, plan.g1_clip)
    if isinstance(is_known_finite, Tensor):
        coefficient = torch.where(is_known_finite, coefficient, 1.0)
    first.figures |= {"g1_norm": norm, "g1_clipped": partial(torch.lt, coefficient, 1)}
    if is_known_finite is False:
        first.skipped = 1
        return False
    first.norm, first.clip = norm, item_on_cpu(coefficient)
    first.is_low = is_low(storage, first) if plan.is_low is None else plan.is_low
    first.g1_squared = squares * coefficient**2
    for group, eps, radius in zip(first.groups, plan.eps, plan.radius, strict=True):
        length: Any = radius
        if radius == AUTO or (eps is None and radius is None and first.is_low):
            length = plan.auto_radius
            first.auto_radius = length if group.strength else first.auto_radius
        if length is not None:
            group.eps = item_on_cpu(ratio(length, norm * coefficient))
        else:
            group.eps = PUBLISHED_EPS if eps is None else eps
    first.figures["eps"] = next(group.eps for group in first.groups if group.strength)
    if first.auto_radius is not None:
        first.figures["radius"] = first.auto_radius
    return True


def stand_at(
    storage: Storage, first: FirstGradient, point: Point, plan: Plan
) -> AbstractContextManager[None]:
    """Stand at ``point`` inside the block; at θ', note how much of the step survived the weights' dtype."""
    distance, signs = point.value, None
    if point is Point.SIDEWAYS:  # a short step meets no curvature, but few bits round it away
        distance, signs = (1.0, plan.step) if first.is_low else (NEARBY, None)
    steps = [group.eps * (distance / storage.loss_scale) * first.clip for group in first.groups]
    seed = None if plan.rounds_to_nearest else plan.step
    return storage.moved(first, steps, seed=seed, measured=point is Point.AHEAD, signs=signs)


def collect(storage: Storage, first: FirstGradient, point: Point, plan: Plan) -> None:
    """Take in the gradients of ``point``; of the gradients sideways only the distance from g1 is kept."""
    # Last of all, since it may reach parameters that no other point has reached.
    if point is plan.scheme.points[-1]:
        first.further[point] = storage.last(first)
        first.further |= {other: storage.laid_out(first, taken) for other, taken in first.taken.items()}
        first.taken.clear()
    elif point is Point.SIDEWAYS:
        gradients = storage.laid_out(first, storage.take_sum())
        first.noise = inner_of_differences(first, gradients, gradients)
    else:
        first.taken[point] = storage.take_sum()


def penalty(
    storage: Storage, first: FirstGradient, delta: Difference, plan: Plan, check: Check | None
) -> tuple[list[Scalar], dict[str, Figure], Settling | None]:
    """The weight of Δ in each group, shrunk by the share of signal and bounded; and the figures to log.

    The third result is what is known about γ now, if it is to be found.
    """
    figures: dict[str, Figure] = {}
    signal, settling = None, plan.settling
    g1_squared, total = first.g1_squared, first.g1_squared.sum()
    weights = [weight_of(group) for group in first.groups]
    floor = plan.floor if check is None else check.floor
    if floor is not None and (first.is_low or check is not None or first.auto_radius is not None):
        noise = floor * plan.scheme.noise
        relative_square = delta.squares.sum() / total  # NaN, "nothing is known", where g1 and with it Δ is 0
        signal = signal_fraction(relative_square, noise)
        if first.auto_radius is not None:
            is_swallowed = check is not None and check.is_swallowed
            found = following(first.auto_radius, relative_square, noise, plan.scheme.order)
            first.next_radius = longer(first.auto_radius) if is_swallowed else item_on_cpu(found)
        figures |= {"noise_floor": floor, "signal": signal}
        if plan.shrinks and first.is_low:
            weights = [item_on_cpu(weight * signal) for weight in weights]
    if settling is not None:
        settling = settle(settling, storage, first, delta, signal)
        strength = item_on_cpu(strength_so_far(settling))
        factors = [strength if is_auto else 1.0 for is_auto in settling.groups]
        weights = [weight * factor for weight, factor in zip(weights, factors, strict=True)]
        figures["strength"] = first_strength(plan.strengths, settling)
    if plan.max_penalty_ratio is not None:
        limit, square = plan.max_penalty_ratio**2 * total, _square(weights, delta.squares)
        bound = torch.where(square > limit, (limit / square).sqrt(), 1.0)
        weights = [item_on_cpu(weight * bound) for weight in weights]
    steps = [group.eps for group in first.groups]
    figures |= {
        "penalty_ratio": partial(_penalty_ratio, weights, delta.squares, g1_squared),
        "curvature": partial(_curvature, steps, delta.inner, g1_squared),
    }
    if check is not None:
        figures["self_check"] = check.self_check
    return weights, figures, settling


def weight_of(group: GroupGradients) -> Scalar:
    """γ/ε, and 0 if there was no step (ε derived from the radius of a vanishing gradient)."""
    if isinstance(group.eps, Tensor):
        return ratio(group.strength, group.eps)
    return group.strength / group.eps if group.eps else 0.0


def _square(weights: list[Scalar], squares: Tensor) -> Tensor:
    """‖penalty‖² over all groups."""
    return (stack_scalars(weights, squares).square() * squares).sum()


def _penalty_ratio(weights: list[Scalar], squares: Tensor, g1_squared: Tensor) -> Tensor:
    return ratio(_square(weights, squares), g1_squared.sum()).sqrt()


def _curvature(steps: list[Scalar], inner: Tensor, g1_squared: Tensor) -> Tensor:
    return ratio(ratio(inner, stack_scalars(steps, inner)).sum(), g1_squared.sum())


def prove(
    first: FirstGradient, delta: Difference, losses: Losses, weights: list[Scalar], figures: dict[str, Figure]
) -> tuple[Evidence, bool]:
    """Add ``loss_check`` to the figures, and drop the penalty of a step that disproves itself.

    Returns the evidence, and whether the penalty was dropped. That happens only where reading costs nothing
    (CPU); elsewhere the alarm is read some steps later.
    """
    evidence = Evidence(
        eps=[group.eps for group in first.groups],
        clip=first.clip,
        norm=first.norm,
        g1_squared=first.g1_squared,
        ahead=delta.ahead,
        squares=delta.squares,
        losses=delta.losses if losses.is_integral else None,
        spacing=losses.spacing,
        is_low=first.is_low,
        g2_norm=delta.figures["g2_norm"],
        fidelity=delta.figures["perturbation_fidelity"],
        penalty_ratio=figures["penalty_ratio"],
    )
    if evidence.losses is None:
        return evidence, False
    figures["loss_check"] = evidence.loss_check
    off = item_on_cpu(evidence.off_by()) if delta.inner.device.type == "cpu" else None
    is_disproved = isinstance(off, float) and off > BEYOND
    if is_disproved:
        weights[:], first.skipped = [0.0] * len(weights), 1
    return evidence, is_disproved


def combine_(storage: Storage, first: FirstGradient, delta: Difference, weights: list[Scalar]) -> None:
    """Write d + weight·Δ where the wrapped optimizer reads gradients; d alone if Δ is not finite."""
    if delta.is_finite is not True:
        first.skipped = 1 if delta.is_finite is False else ~torch.as_tensor(delta.is_finite)
    if delta.is_finite is False and not storage.overflow_skips_step:
        storage.put_back(first)
        return
    # If nobody has read it, the choice is the device's.
    condition = True if storage.overflow_skips_step else delta.is_finite
    for group, written, weight in zip(first.groups, delta.written, weights, strict=True):
        if not delta.is_delta:
            multi_tensor.combine_(group.g1, written, weight=weight, clip=delta.clip, is_finite=condition)
            continue
        multi_tensor.scale_(written, weight)
        multi_tensor.add_(written, group.g1)
        if isinstance(condition, Tensor):
            multi_tensor.choose_(written, group.g1, condition=condition)
    storage.keep(first)
