"""How precise are the passes, and how long should a step be? What is measured, and what is said about it.

Which precision is low
    Weights or an engine in half precision say so. Else g1 tells, in the first regularized step: what was
    computed, cast or reduced in half precision has at most 11 significant bits where float32 has 24
    (:func:`has_few_bits`). Without ``eps`` and ``radius``, low precision takes ``radius="auto"`` and full
    precision the published ε of 1e-3.

The self-check
    Each gradient carries the rounding errors of its pass. By them two gradients differ by the *noise floor*,
    relative to ‖g1‖, while the difference that is asked for has the length rel = ‖Δ‖/‖g1‖. What exceeds the
    noise floor is *signal*, the share 1 − floor²/rel² of the square. The floor is the smaller of two figures,
    both of steps as long as the real one, because shorter ones are rounded less, or to nothing:

        ‖∇L(θ + ε·d̃) − g1‖/‖g1‖            rounding, and curvature in all directions
        √(4/3)·‖(g₊ + g₋)/2 − g1‖/‖g1‖     rounding, and curvature that changes along d

    Here d̃ is d with its elements elsewhere, and g± = ∇L(θ ± ε·d).

    In full precision a hundredth of ε·d takes the place of ε·d̃: it arrives, and meets no curvature. The
    former is the floor of large models, in which hardly any direction is curved. In small ones, and where
    each parameter has a loss of its own, all are; there the latter leaves out what curvature stays the same.
    Its factor makes errors of the same size in all three gradients come out as those of two.

    The *self-check* mirrors the step: it is the cosine of g2 − g1 and g1 − ∇L(θ − ε·d). Curvature makes it 1.
    Rounding errors of the same size in all three gradients make it −1/2, because those of g1 enter with
    opposite signs. Curvature that changes within the step makes it fall as well. The estimate itself has with
    H·d the cosine √((1 + 2·self_check)/3) if its errors are rounding, and √((1 + self_check)/2) if they are
    changing curvature.

``radius="auto"``
    Of the difference rel, rounding of size n makes the share n/rel, and curvature that changes within the
    step one that grows as rel, or as rel² in a central difference. These balance near
    rel = 0.7·n^(1/(order + 1)), with order 1 for "forward" and 2 for "central". On SmolLM2-135M this held in
    bf16, bf16 autocast and fp16, at radii that differ by a factor of eight. rel is known in every step, and
    n, the noise floor of Δ, since the last check.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradreg_optim.core import multi_tensor
from gradreg_optim.core.plan import Plan
from gradreg_optim.core.schemes import stack_scalars
from gradreg_optim.core.step import Check, FirstGradient, Gradients, Point, Scalar
from gradreg_optim.core.storage import Storage

AUTO = "auto"
PUBLISHED_EPS = 1e-3
DEFAULT_CHECK_EVERY = 100
"""Steps from one check to the next where precision is low; two more gradients, that is 1% more."""
BALANCE = 0.7
LEAST, MOST = 1e-6, 1.0
"""Bounds of a radius that adapts."""
FASTEST = 2.0
"""The largest factor by which it changes from one step to the next."""
FEW = 64
"""Elements other than 0 that a gradient must have to tell something about its precision."""


# Which precision is low.


def has_few_bits(tensors: Sequence[Tensor]) -> Tensor | None:
    """1 if one of the float32 ``tensors`` holds half-precision numbers or sums of some, else 0; a 0-d tensor.

    These leave the last byte of the 24 significant bits empty, which float32 results do once in 256 times.

    >>> g = torch.randn(10, 10); has_few_bits([g]), has_few_bits([g, g.bfloat16().float()])
    (tensor(0.), tensor(1.))
    """
    found = []
    for tensor in tensors:
        if tensor.dtype == torch.float32 and tensor.numel() >= FEW:
            values = multi_tensor.sampled(tensor).reshape(-1).contiguous()
            is_known = values != 0
            is_short = is_known & (values.view(torch.int32) & 0xFF == 0)
            found.append((is_known.sum() >= FEW) & (is_short.sum() * 2 > is_known.sum()))
    return torch.stack(found).any().float() if found else None


def is_low(storage: Storage, first: FirstGradient) -> bool:
    """Whether the passes have fewer bits than float32, on any rank. Waits for the device."""
    if storage.has_low_precision:  # of which every rank knows
        return True
    few = has_few_bits([tensor for group in first.groups for tensor in group.counted(group.g1)])
    return bool(storage.sum_over_ranks(stack_scalars([0.0 if few is None else few])).sum() > 0)


# The self-check.


def signal_fraction(relative_square: Tensor, floor: float) -> Tensor:
    """max(0, 1 − floor²/rel²), the share of ‖Δ‖² that rounding does not explain; 0 where rel is NaN.

    >>> signal_fraction(torch.tensor([0.04, 0.0, torch.nan]), 0.1)
    tensor([0.7500, 0.0000, 0.0000])
    """
    return ((relative_square - max(floor**2, 1e-30)) / relative_square).nan_to_num(0.0).clamp(min=0)


def inner_of_differences(first: FirstGradient, left: Gradients, right: Gradients) -> Tensor:
    """⟨left − g1, right − g1⟩ over this rank's tensors, g1 as it is before it is clipped."""
    products = []
    for group, a, b in zip(first.groups, left, right, strict=True):
        lists = a, b, group.g1
        products.append(multi_tensor.inner(*(lists if group.counts is None else map(group.counted, lists))))
    return stack_scalars(products).sum()


def run_check(storage: Storage, first: FirstGradient, plan: Plan) -> Check | None:
    """Compare the differences ahead and behind in the step of a check, and both with the noise. Waits."""
    ahead, behind = first.further[Point.AHEAD], first.further[Point.BEHIND]
    pairs = ((ahead, behind), (ahead, ahead), (behind, behind))
    scale, noise = storage.loss_scale, first.noise
    products: list[Any] = [
        *(inner_of_differences(first, *pair) for pair in pairs),
        noise,
        *_arrived(first, scale),
    ]
    sums = [value / scale**2 for value in storage.sum_over_ranks(stack_scalars(products)).tolist()]
    eps = next(float(group.eps) for group in first.groups if group.strength)
    settled = None if first.auto_radius is None else plan.floor is not None
    clip, norm = float(first.clip), float(first.norm)
    return evaluated(sums, norm=norm, eps=eps, clip=clip, plan=plan, is_low=first.is_low, is_settled=settled)


def _arrived(first: FirstGradient, scale: float) -> list[Tensor]:
    """⟨s̃, s⟩ and ‖s‖² of the step s and the step s̃ that arrived in the weights.

    Then the same of float32 matrices, as half-precision passes round them.
    """
    moments = [
        (group.eps * group.moved_along, group.eps * group.eps * group.step_squared) for group in first.groups
    ]
    along, squares = (stack_scalars([pair[i] for pair in moments], first.norm).sum() for i in (0, 1))
    found = [torch.zeros(2, device=first.norm.device)]
    for group in first.groups if first.is_low else []:
        for weight, g1 in zip(group.weights, group.g1, strict=False):  # g1 of a parameter reached later is 0
            if weight.dtype == torch.float32 and weight.ndim > 1 and weight.numel():
                start = multi_tensor.sampled(weight)
                step = multi_tensor.sampled(g1) * (group.eps * (first.clip / scale))
                seen = (start + step).bfloat16().float() - start.bfloat16().float()
                found.append(torch.stack([(seen * step).sum(), step.square().sum()]).to(found[0].device))
    return [along, squares * (first.clip / scale), *torch.stack(found).sum(0)]


def evaluated(
    sums: list[float],
    *,
    norm: float,
    eps: float,
    clip: float,
    plan: Plan,
    is_low: bool,
    is_settled: bool | None = None,
) -> Check | None:
    """What a check says, from sums over all ranks.

    It is ``None`` if a gradient overflowed or g1 is 0; the next step then checks again.

    Args:
        sums: ⟨a, b⟩, ‖a‖², ‖b‖² and ‖c‖², where a = g2 − g1, b = g₋ − g1 and c the same sideways; g1 is not
            clipped. Then ⟨s̃, s⟩ and ‖s‖² of the step s and what came of it in the weights; and the same of
            what passes make of it, 0 if they take the weights as they are.
        norm: ‖g1‖.
        eps: ε of the first regularized group.
        clip: the factor by which g1 is clipped.
        plan: the scheme, and whether the user asked for checks.
        is_low: whether the passes have fewer bits than float32.
        is_settled: where the radius adapts, whether it has had time to; ``None`` where it is the user's.
    """
    product, ahead, behind, noise, *shares = sums
    if not all(map(math.isfinite, sums[:4])) or not norm:
        return None
    radius, scheme = eps * norm * clip, plan.scheme
    in_weights, in_passes = (
        x / square if square and math.isfinite(x) else 1.0 for x, square in (shares[:2], shares[2:])
    )
    if not ahead or not behind:
        if min(in_weights, in_passes) >= 0.5:
            return Check(0.0, 0.0, None)  # the loss is linear
        text = "The gradients at both points are equal to the last bit"
        return Check(0.0, 0.0, too_short(text, eps, radius, is_settled), is_swallowed=True)
    self_check = -product / math.sqrt(ahead) / math.sqrt(behind)
    steady = max(0.0, ahead + behind + 2 * product) / 3
    # Without any noise, the step sideways was rounded away.
    floor = math.sqrt(min(noise or steady, steady)) / norm
    if in_passes < 0.1:
        text = (
            f"Of the step, the share {in_passes:.2f} arrives in the passes, which round weights to half "
            "precision"
        )
        return Check(
            min(self_check, in_passes), floor, too_short(text, eps, radius, is_settled), is_swallowed=True
        )
    if self_check >= scheme.sufficient:
        return Check(self_check, floor, None)
    relative = (
        math.sqrt((ahead + behind - 2 * product) / 4 if Point.BEHIND in scheme.points else ahead) / norm
    )
    told = advice(
        self_check, floor * scheme.noise, relative, eps, radius, order=scheme.order, is_settled=is_settled
    )
    # In full precision a low self-check is what the kinks of a ReLU make, at which the penalty is
    # well-behaved.
    is_wanted = is_low or plan.is_check_asked or relative < 2 * floor * scheme.noise
    return Check(self_check, floor, told if is_wanted else None)


def too_short(found: str, eps: float, radius: float, is_settled: bool | None = None) -> str | None:
    """The warning for a step that rounding swallows; ``None`` while a radius that adapts can still grow."""
    if is_settled is not None and radius < MOST / 2:
        return None
    return (
        f"Gradient regularization: {found}: the difference of the two gradients is no measure of curvature. "
        f"A step {radius:.2g} long (eps {eps:.2g}) is too short for the precision of the weights or of the "
        "passes, unless the loss is linear in the weights: a longer step helps (set "
        f"radius={max(0.005, 10 * radius):.1g})."
    )


def advice(
    self_check: float,
    noise: float,
    relative: float,
    eps: float,
    radius: float,
    *,
    order: int = 1,
    is_settled: bool | None = None,
) -> str | None:
    """The warning for a low self-check; ``None`` where a radius that adapts will mend it."""
    figures = (
        f"Gradient regularization: the self-check is {self_check:.2f}, too low: the difference of the two "
        f"gradients is no reliable measure of curvature. It is {relative:.2g} of the gradient, the rounding "
        f"noise {noise:.2g}, the step {radius:.2g} long (eps {eps:.2g}). "
    )
    factor = balanced(noise, order) / max(relative, 1e-9)
    # Where each parameter has a loss of its own, a step that is too long changes the gradient as much
    # sideways as ahead. Half of the gradient, however, rounding does not change.
    is_noise = relative < min(2 * noise, 0.5)
    if is_settled is not None:
        remedies = (
            "The radius has adapted to it. What is left: fp16 in place of bf16 in the passes, or "
            "method='central'."
        )
        return figures + remedies if is_settled and (is_noise or self_check < 0) else None
    if is_noise:
        return figures + (
            "Rounding prevails: a longer step helps (set "
            f"radius={min(10.0, max(2.0, factor)) * radius:.1g}), and more do fp16 or fp32 in place of bf16 "
            "in the passes, and method='central'."
        )
    return figures + (
        "The curvature changes within the step: a shorter one helps (set "
        f"radius={min(0.5, max(0.1, factor)) * radius:.1g}), or method='central'."
    )


# A radius that adapts.


def balanced(noise: float, order: int) -> float:
    """The rel to aim at, at least 1.5 times the noise; a noise of 0 counts as 1e-7, what float32 can resolve.

    >>> round(balanced(0.05, order=1), 3), round(balanced(0.025, order=2), 3)
    (0.157, 0.205)
    """
    return float(max(BALANCE * max(noise, 1e-7) ** (1 / (order + 1)), 1.5 * noise))


def longer(radius: Scalar) -> float:
    """The radius after a step that the arithmetic swallowed. Waits for the device."""
    return min(float(radius) * FASTEST**2, MOST)


def following(radius: Scalar, relative_square: Tensor, noise: float, order: int) -> Tensor:
    """The radius of the next step: half of the way, in logarithms, to where rel would be balanced.

    The part of rel that is curvature is in proportion to the radius. Every batch has another balance: half of
    the way averages over some. The radius stays where it is if nothing is known.

    >>> following(0.005, torch.tensor(0.157**2), noise=0.05, order=1)
    tensor(0.0050)
    >>> following(0.005, torch.tensor(0.001**2), noise=0.05, order=1)
    tensor(0.0100)
    """
    wanted, found = balanced(noise, order) ** 2 - noise**2, relative_square - noise**2
    factor = (found / wanted).nan_to_num(1.0).clamp(FASTEST**-4, FASTEST**4).pow(-0.25)
    return (radius * factor).clamp(LEAST, MOST)
