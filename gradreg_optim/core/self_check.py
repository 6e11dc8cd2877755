"""Is the difference of two gradients curvature, or rounding? What is measured, and what is said about it.

Each gradient carries the rounding errors of its pass. By them two gradients differ by the *noise floor*, relative to ‖g1‖,
while the difference that is asked for has the length rel = ‖Δ‖/‖g1‖. What exceeds the noise floor is *signal*, the share
1 − floor²/rel² of the square. The floor is the smaller of two figures, both of steps as long as the real one, because
shorter ones are rounded less, or to nothing:

    ‖∇L(θ + ε·d̃) − g1‖/‖g1‖              d̃ is d with its elements elsewhere: rounding, and curvature in all directions
    √(4/3)·‖(g₊ + g₋)/2 − g1‖/‖g1‖       g± = ∇L(θ ± ε·d): rounding, and curvature that changes along d

Where all have the bits of float32, a hundredth of ε·d takes the place of ε·d̃: it arrives, and meets no curvature.

The former is the floor of large models, in which hardly any direction is curved. In small ones, and where each parameter
has a loss of its own, all are; there the latter leaves out what curvature stays the same. Its factor makes errors of the
same size in all three gradients come out as those of two.

The *self-check* mirrors the step: it is the cosine of g2 − g1 and g1 − ∇L(θ − ε·d). Curvature makes it 1. Rounding errors
of the same size in all three gradients make it −1/2, because those of g1 enter with opposite signs. Curvature that changes
within the step makes it fall as well. (Half the step instead of the mirrored one would let the errors of g1 enter with the
same sign: on nothing but noise that cosine is 1/2.) The estimate itself has with H·d the cosine √((1 + 2·self_check)/3) if
its errors are rounding, and √((1 + self_check)/2) if they are changing curvature.
"""

from __future__ import annotations

import math

from torch import Tensor

from gradreg_optim.core.plan import Scheme
from gradreg_optim.core.radius import MOST, balanced
from gradreg_optim.core.step import Check, Point

DEFAULT_CHECK_EVERY = 100
"""Steps from one check to the next where precision is low; two more gradients, that is 1% more."""


def signal_fraction(relative_square: Tensor, floor: float) -> Tensor:
    """max(0, 1 − floor²/rel²): the share of the squared difference that rounding does not explain; 0 where rel is NaN.

    >>> import torch
    >>> signal_fraction(torch.tensor([0.04, 0.0, torch.nan]), 0.1)
    tensor([0.7500, 0.0000, 0.0000])
    """
    return ((relative_square - max(floor**2, 1e-30)) / relative_square).nan_to_num(0.0).clamp(min=0)


def evaluated(
    sums: list[float], *, norm: float, eps: float, clip: float, scheme: Scheme, is_settled: bool | None = None
) -> Check | None:
    """What a check says, from sums over all ranks; ``None`` if a gradient overflowed or g1 is 0: the next step checks again.

    Args:
        sums: ⟨a, b⟩, ‖a‖², ‖b‖² and ‖c‖², where a = g2 − g1, b = g₋ − g1 and c the same sideways; g1 is not clipped. Then
            ⟨s̃, s⟩ and ‖s‖² of the step s and what came of it in the weights; and the same of what passes make of it, 0 if
            they take the weights as they are.
        norm: ‖g1‖.
        eps: ε of the first regularized group.
        clip: the factor by which g1 is clipped.
        scheme: what Δ is.
        is_settled: where the radius finds itself, whether it has had time to; ``None`` where it is the user's.
    """
    product, ahead, behind, noise, *shares = sums
    if not all(map(math.isfinite, sums[:4])) or not norm:
        return None
    radius = eps * norm * clip
    in_weights, in_passes = (x / square if square and math.isfinite(x) else 1.0 for x, square in (shares[:2], shares[2:]))
    if not ahead or not behind:
        if min(in_weights, in_passes) >= 0.5:
            return Check(0.0, 0.0, None)  # the loss is linear
        text = "The gradients at both points are equal to the last bit"
        return Check(0.0, 0.0, too_short(text, eps, radius, is_settled), is_swallowed=True)
    self_check = -product / math.sqrt(ahead) / math.sqrt(behind)
    steady = max(0.0, ahead + behind + 2 * product) / 3
    floor = math.sqrt(min(noise or steady, steady)) / norm  # no noise at all: what the step sideways moved was rounded away
    if in_passes < 0.1:
        text = f"Of the step, the share {in_passes:.2f} arrives in the passes, which round weights to half precision"
        return Check(min(self_check, in_passes), floor, too_short(text, eps, radius, is_settled), is_swallowed=True)
    if self_check >= scheme.sufficient:
        return Check(self_check, floor, None)
    is_two_sided = Point.BEHIND in scheme.points
    relative = math.sqrt((ahead + behind - 2 * product) / 4 if is_two_sided else ahead) / norm
    noise_of_delta = floor * (scheme.noise or 0.0)
    told = advice(self_check, noise_of_delta, relative, eps, radius, order=scheme.order, is_settled=is_settled)
    return Check(self_check, floor, told)


def too_short(found: str, eps: float, radius: float, is_settled: bool | None = None) -> str | None:
    """What to tell a user whose step the arithmetic swallows; nothing while a radius that finds itself can still grow."""
    if is_settled is not None and radius < MOST / 2:
        return None
    return (
        f"Gradient regularization: {found}: the difference of the two gradients is no measure of curvature. A step "
        f"{radius:.2g} long (eps {eps:.2g}) is too short for the precision of the weights or of the passes, unless the loss "
        f"is linear in the weights: a longer step helps (set radius={max(0.005, 10 * radius):.1g})."
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
    """What to tell a user whose self-check is low; nothing where a radius that finds itself will mend it."""
    figures = (
        f"Gradient regularization: the self-check is {self_check:.2f}, too low: the difference of the two gradients is no "
        f"reliable measure of curvature. It is {relative:.2g} of the gradient, the rounding noise {noise:.2g}, the step "
        f"{radius:.2g} long (eps {eps:.2g}). "
    )
    factor = balanced(noise, order) / max(relative, 1e-9)
    # Where each parameter has a loss of its own, a step that is too long changes the gradient as much sideways as ahead.
    # Half of the gradient, however, rounding does not change.
    is_noise = relative < min(2 * noise, 0.5)
    if is_settled is not None:
        remedies = "The radius has been adapted to it. What is left: fp16 in place of bf16 in the passes, method='central', "
        return figures + remedies + "method='exact'." if is_settled and (is_noise or self_check < 0) else None
    if is_noise:
        return figures + (
            f"Rounding prevails: a longer step helps (set radius={min(10.0, max(2.0, factor)) * radius:.1g}), and more do "
            "fp16 or fp32 in place of bf16 in the passes, method='central' and method='exact'."
        )
    return figures + (
        "The curvature changes within the step: a shorter one helps (set "
        f"radius={min(0.5, max(0.1, factor)) * radius:.1g}), or method='central'."
    )
