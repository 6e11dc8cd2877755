"""Is the difference of two gradients curvature, or rounding? What is measured, and what is said about it.

Each gradient carries the rounding errors of its pass. Two of them at (nearly) the same point differ by

    floor = ‖∇L(θ + δ) − ∇L(θ)‖/‖∇L(θ)‖        δ → 0

while the difference that is asked for has the length rel = ‖Δ‖/‖g1‖. What exceeds the noise floor is *signal*, the share
1 − floor²/rel² of the square.

The *self-check* mirrors the step: it is the cosine of g2 − g1 and g1 − ∇L(θ − ε·d). Curvature makes it 1. Rounding errors
of the same size in all three gradients make it −1/2, because those of g1 enter with opposite signs. Curvature that changes
within the step makes it fall as well. (Half the step instead of the mirrored one would let the errors of g1 enter with the
same sign: on nothing but noise that cosine is 1/2.) The estimate itself has with H·d the cosine √((1 + 2·self_check)/3) if
its errors are rounding, and √((1 + self_check)/2) if they are changing curvature.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradreg_optim.core.plan import Scheme
from gradreg_optim.core.step import Check, Point

DEFAULT_CHECK_EVERY = 100
"""Steps from one check to the next where precision is low; two more gradients, that is 1% more."""


def signal_fraction(relative_square: Tensor, floor: float) -> Tensor:
    """max(0, 1 − floor²/rel²): the share of the squared difference that rounding does not explain.

    >>> signal_fraction(torch.tensor(0.04), 0.1)
    tensor(0.7500)
    """
    explained = floor**2 / relative_square
    return torch.where(relative_square > 0, (1 - explained).clamp(min=0), torch.zeros_like(relative_square))


def evaluated(sums: list[float], *, norm: float, eps: float, clip: float, scheme: Scheme) -> Check | None:
    """What a check says, from sums over all ranks; ``None`` after an overflow, when the next step is to check again.

    Args:
        sums: ⟨a, b⟩, ‖a‖², ‖b‖² and ‖c‖², where a = g2 − g1, b = g₋ − g1 and c is the same next to θ; g1 is not clipped.
        norm: ‖g1‖.
        eps: ε of the first regularized group.
        clip: the factor by which g1 is clipped.
        scheme: what Δ is.
    """
    product, ahead, behind, noise = sums
    self_check = -product / math.sqrt(ahead * behind) if ahead * behind else 1.0
    floor = math.sqrt(noise) / norm if norm else 0.0
    if not math.isfinite(self_check) or not math.isfinite(floor):
        return None
    if self_check >= scheme.sufficient:
        return Check(self_check, floor, None)
    is_two_sided = Point.BEHIND in scheme.points
    relative = math.sqrt((ahead + behind - 2 * product) / 4 if is_two_sided else ahead) / norm
    noise_of_delta = floor * (scheme.noise or 0.0)
    return Check(self_check, floor, advice(self_check, noise_of_delta, relative, eps, eps * norm * clip))


def advice(self_check: float, floor: float, relative: float, eps: float, radius: float) -> str:
    """What to tell a user whose self-check is low."""
    figures = (
        f"Gradient regularization: the self-check is {self_check:.2f}, too low: the difference of the two gradients is no "
        f"reliable measure of curvature. It is {relative:.2g} of the gradient, the rounding noise {floor:.2g}, the step "
        f"{radius:.2g} long (eps {eps:.2g}). "
    )
    if relative < 2 * floor:
        return figures + (
            f"Rounding prevails: a longer step helps (radius={3 * floor / max(relative, floor) * radius:.1g}), and more do "
            "fp16 or fp32 in place of bf16 in the passes, method='central' and method='exact'."
        )
    return figures + (
        f"The curvature changes within the step: a shorter one helps (radius={radius / 3:.1g}), or method='central'."
    )
