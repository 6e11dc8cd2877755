"""The algorithm: one generator, which yields wherever a gradient is wanted.

Objective (Ackermann et al. 2026, arXiv 2602.18037; Karakida et al. 2023, arXiv 2210.02720)

    L(θ) + (γ/2)·‖∇L(θ)‖²        with gradient        ∇L + γ·H∇L

Estimator

    g1 = ∇L(θ)        d = clip(g1)        θ' = θ + ε·d        g2 = ∇L(θ')        Δ = clip(g2) − d
    g  = d + (γ/ε)·Δ

Whoever drives the generator runs forward and backward at each point. Where gradients and weights are kept is the business
of a :class:`~gradreg_optim.core.storage.Storage`; what Δ is, that of a :class:`~gradreg_optim.core.plan.Scheme`.

Symbols in the code: ``strength`` is γ, ``eps`` is ε, ``radius`` is ρ = ‖θ' − θ‖ = ε·‖d‖, ``weight`` is γ/ε.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gradreg_optim.core import multi_tensor
from gradreg_optim.core.finite_difference import clip_coefficient, is_finite, item_on_cpu, ratio, stack_scalars
from gradreg_optim.core.losses import Losses
from gradreg_optim.core.plan import Plan
from gradreg_optim.core.radius import AUTO, following, longer
from gradreg_optim.core.self_check import evaluated, signal_fraction
from gradreg_optim.core.step import Check, Difference, Figure, FirstGradient, Gradients, Outcome, PartOfPass, Point, Scalar
from gradreg_optim.core.storage import Storage


@torch.no_grad()
def regularized(storage: Storage, plan: Plan, losses: Losses | None = None) -> Generator[Point, PartOfPass | None, Outcome]:
    """Replace the gradient g1 that ``storage`` holds after the first pass by g1 + (γ/ε)·Δ.

    Yields each point at which a gradient is wanted, θ first, and the last one twice if the ``losses`` are suspicious. The
    driver may answer θ with the part of that pass that it will repeat. If it closes the generator at a point, or throws into
    it, the weights are at θ, bit for bit, and g1 is back.
    """
    part = yield Point.THETA
    if not plan.points:
        return Outcome({"strength": 0.0})
    storage.check_first_pass()
    first = storage.take(plan.strengths, plan.excluded)
    first.figures["strength"] = next(strength for strength in plan.strengths if strength)
    try:
        if not storage.has_gradient(first):
            storage.put_back(first)
            return Outcome(first.figures, is_empty=True)
        if losses is not None and losses.are_low(storage):
            plan = replace(plan, points=plan.points_if_low or plan.points, low_dtype=losses.low_dtype)
        if not choose_step(storage, first, plan):  # d = clip(g1), ε; False: there is no finite gradient
            storage.put_back(first)
            return Outcome(first.figures, first.skipped)
        for point in plan.points:  # usually one
            with plan.scheme.at(storage, first, point, plan):  # θ' = θ + ε·d inside, θ again after it
                yield point
                if losses is not None and point is plan.points[-1] and losses.are_far(storage, first, plan, part):
                    storage.take_sum()  # and drop it: it is taken once more
                    yield point
                    losses.require_same(storage)
            collect(storage, first, point, part, plan)
        check = run_check(storage, first, plan)
        delta = plan.scheme.difference(storage, first, plan)
        weights, figures = penalty(first, delta, plan, check)
        combine_(storage, first, delta, weights)
    except BaseException:
        storage.abandon(first)
        raise
    figures = first.figures | delta.figures | figures
    return Outcome(figures, first.skipped, check, auto_radius=first.next_radius)


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
    is_low = plan.low_dtype is not None or storage.has_low_precision
    for group, square, eps, radius in zip(first.groups, squares, plan.eps, plan.radius, strict=True):
        group.g1_squared = square * coefficient**2
        length: Any = radius
        if radius == AUTO:
            length = plan.auto_radius if is_low or eps is None else None
            first.auto_radius = length if group.strength else first.auto_radius
        group.eps = eps if length is None else item_on_cpu(ratio(length, norm * coefficient))  # type: ignore[assignment]
    if Point.TWICE not in plan.points:
        first.figures["eps"] = next(group.eps for group in first.groups if group.strength)
        if first.auto_radius is not None:
            first.figures["radius"] = first.auto_radius
    return True


def collect(storage: Storage, first: FirstGradient, point: Point, part: PartOfPass | None, plan: Plan) -> None:
    """Take in the gradients of ``point``; of those sideways their distance from g1 is all that is wanted."""
    if point is plan.points[-1]:  # last of all, since it may reach parameters that no other point has reached
        first.further[point] = storage.last(first)
        first.further |= {other: storage.laid_out(first, taken) for other, taken in first.taken.items()}
        first.taken.clear()
        for other, gradients in first.further.items():
            complete_(storage, first, gradients, part, other)
    elif point is Point.SIDEWAYS:
        gradients = storage.laid_out(first, storage.take_sum())
        complete_(storage, first, gradients, part, point)
        first.noise = _inner_of_differences(first, gradients, gradients)
    else:
        first.taken[point] = storage.take_sum()


def complete_(storage: Storage, first: FirstGradient, gradients: Gradients, part: PartOfPass | None, point: Point) -> None:
    """Make gradients of a part S of n micro-batches stand for all: ĝ = g1 + (n/m)·(g_S − g1_S); see ``fraction``."""
    if part is None:
        return
    starts = None if point is Point.TWICE else storage.laid_out(first, part.gradients)
    for number, (group, written) in enumerate(zip(first.groups, gradients, strict=True)):
        if starts is not None:
            multi_tensor.subtract_(written, starts[number])
        multi_tensor.scale_(written, part.factor)
        if starts is not None:
            multi_tensor.add_(written, group.g1)


def run_check(storage: Storage, first: FirstGradient, plan: Plan) -> Check | None:
    """In the step of a check: compare the differences ahead and behind, and both with the noise. Waits for the device."""
    if first.noise is None:
        return None
    ahead, behind = first.further[Point.AHEAD], first.further[Point.BEHIND]
    pairs = ((ahead, behind), (ahead, ahead), (behind, behind))
    scale = storage.loss_scale
    products = [*(_inner_of_differences(first, *pair) for pair in pairs), first.noise]
    products += _arrived(first, plan.low_dtype, scale)
    sums = [value / scale**2 for value in storage.sum_over_ranks(stack_scalars(products)).tolist()]
    eps = next(float(group.eps) for group in first.groups if group.strength)
    is_settled = None if first.auto_radius is None else plan.floor is not None
    return evaluated(
        sums, norm=float(first.norm), eps=eps, clip=float(first.clip), scheme=plan.scheme, is_settled=is_settled
    )


def _arrived(first: FirstGradient, low_dtype: torch.dtype | None, scale: float) -> list[Tensor]:
    """⟨what came of the step, step⟩ and ‖step‖²; and the same of float32 matrices as passes in ``low_dtype`` round them."""
    moments = [(group.eps * group.moved_along, group.eps * group.eps * group.step_squared) for group in first.groups]
    along, squares = (stack_scalars([pair[i] for pair in moments], first.norm).sum() for i in (0, 1))
    found = [torch.zeros(2, device=first.norm.device)]
    for group in first.groups if low_dtype is not None else []:
        for weight, g1 in zip(group.weights, group.g1, strict=False):  # g1 of a parameter reached later is 0
            if weight.dtype == torch.float32 and weight.ndim > 1 and weight.numel():
                start, step = multi_tensor.sampled(weight), multi_tensor.sampled(g1) * (group.eps * (first.clip / scale))
                seen = (start + step).to(low_dtype).float() - start.to(low_dtype).float()
                found.append(torch.stack([(seen * step).sum(), step.square().sum()]).to(found[0].device))
    return [along, squares * (first.clip / scale), *torch.stack(found).sum(0)]


def _inner_of_differences(first: FirstGradient, left: Gradients, right: Gradients) -> Tensor:
    """⟨left − g1, right − g1⟩ over this rank's tensors, g1 as it is before it is clipped."""
    products = []
    for group, a, b in zip(first.groups, left, right, strict=True):
        g1 = group.counted(group.g1)
        products.append(multi_tensor.inner_of_differences(g1, group.counted(a), group.counted(b)))
    return stack_scalars(products).sum()


def penalty(
    first: FirstGradient, delta: Difference, plan: Plan, check: Check | None
) -> tuple[list[Scalar], dict[str, Figure]]:
    """The weight of Δ in each group, shrunk by its share of signal and bounded, and what is to be logged about it."""
    figures: dict[str, Figure] = {}
    g1_squared = stack_scalars([group.g1_squared for group in first.groups])
    total = g1_squared.sum()
    weights = [plan.scheme.weight(group) for group in first.groups]
    floor = plan.floor if check is None else check.floor
    if floor is not None and plan.scheme.noise is not None:
        relative_square = delta.squares.sum() / total  # NaN, "nothing is known", where g1 and with it Δ is 0
        signal = signal_fraction(relative_square, floor * plan.scheme.noise)
        if first.auto_radius is not None:
            is_swallowed = check is not None and check.is_swallowed
            found = following(first.auto_radius, relative_square, floor * plan.scheme.noise, plan.scheme.order)
            first.next_radius = longer(first.auto_radius) if is_swallowed else item_on_cpu(found)
        figures |= {"noise_floor": floor, "signal": signal}
        if plan.shrinks:
            weights = [item_on_cpu(weight * signal) for weight in weights]
    if plan.max_penalty_ratio is not None:
        limit, square = plan.max_penalty_ratio**2 * total, _square(weights, delta.squares)
        bound = torch.where(square > limit, (limit / square).sqrt(), 1.0)
        weights = [item_on_cpu(weight * bound) for weight in weights]
    steps = [1.0 if Point.TWICE in plan.points else group.eps for group in first.groups]
    figures |= {
        "penalty_ratio": partial(_penalty_ratio, weights, delta.squares, g1_squared),
        "curvature": partial(_curvature, steps, delta.inner, g1_squared),
    }
    if check is not None:
        figures["self_check"] = check.self_check
    return weights, figures


def _square(weights: list[Scalar], squares: Tensor) -> Tensor:
    """‖penalty‖² over all groups."""
    return (stack_scalars(weights, squares).square() * squares).sum()


def _penalty_ratio(weights: list[Scalar], squares: Tensor, g1_squared: Tensor) -> Tensor:
    return ratio(_square(weights, squares), g1_squared.sum()).sqrt()


def _curvature(steps: list[Scalar], inner: Tensor, g1_squared: Tensor) -> Tensor:
    return ratio(ratio(inner, stack_scalars(steps, inner)).sum(), g1_squared.sum())


def combine_(storage: Storage, first: FirstGradient, delta: Difference, weights: list[Scalar]) -> None:
    """Write d + weight·Δ where the wrapped optimizer reads gradients; d alone if Δ is not finite."""
    if delta.is_finite is not True:
        first.skipped = 1 if delta.is_finite is False else ~torch.as_tensor(delta.is_finite)
    if delta.is_finite is False and not storage.overflow_skips_step:
        storage.put_back(first)
        return
    condition = True if storage.overflow_skips_step else delta.is_finite  # if nobody has read it, the choice is the device's
    for number, (group, written, weight) in enumerate(zip(first.groups, delta.written, weights, strict=True)):
        if not delta.is_delta:
            combined_with = delta.combined_with[number] if delta.combined_with else None
            multi_tensor.combine_(
                group.g1, written, weight=weight, clip=delta.clip, is_finite=condition, combined_with=combined_with
            )
            continue
        multi_tensor.add_penalty_(group.g1, written, weight=weight)
        if isinstance(condition, Tensor):
            multi_tensor.choose_(condition, written, group.g1)
    storage.keep(first)


def call_in_each(
    closure: Callable[[], Any], passes: Iterable[Any], noted: Callable[[Any], Any], calling_scaler: Callable[[], Any]
) -> tuple[Any, bool]:
    """Call ``closure`` in each pass; returns the loss at θ as ``noted`` returns it, and whether all passes ran.

    Composer's scaler hands over a closure that unscales, and returns ``None`` after an overflow on any rank: then no further
    pass is run. Elsewhere a closure that returns no loss means nothing.
    """
    call, losses = torch.enable_grad()(closure), list[Any]()
    for _ in passes:
        losses.append(noted(call()))
        if losses[-1] is None and calling_scaler() is not None:
            return None, False
    return losses[0], True
