"""Finite differences of gradients: the schemes ``"forward"`` and ``"central"``, and the algebra of moments.

    forward     θ, θ + ε·d              Δ = c·g2 − g1              Δ/ε = H·d + O(ε·‖d‖²)
    central     θ, θ − ε·d, θ + ε·d     Δ = (c₊·g₊ − c₋·g₋)/2      Δ/ε = H·d + O(ε²·‖d‖³)

with g1 clipped already, and c the factors that clip the others. Rounding in g1 drops out of the central
difference. Both are exact on a quadratic at any ε. Scalars are 0-d tensors on the device of the data, so that
nothing here waits for it.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from gradreg_optim.core import multi_tensor
from gradreg_optim.core.plan import Plan, Scheme
from gradreg_optim.core.step import Difference, Figure, FirstGradient, Gradients, Point, Scalar
from gradreg_optim.core.storage import Storage


def forward_difference(storage: Storage, first: FirstGradient, plan: Plan) -> Difference:
    """Measure Δ = c·g2 − g1, which is not written anywhere."""
    second = first.further.pop(Point.AHEAD)
    first.further.clear()
    found = []
    for group, g2 in zip(first.groups, second, strict=True):
        if group.counts is None or all(group.counts):
            found.append(multi_tensor.moments_(group.g1, g2, scale=first.clip))
        else:
            multi_tensor.scale_(group.g1, first.clip)
            found.append(multi_tensor.moments_(group.counted(group.g1), group.counted(g2)))
    inner, squares, losses, fidelity = summed(storage, first, found)
    g1_squared, ahead = first.g1_squared, inner + first.g1_squared
    g2_norm = length_of_sum(g1_squared, inner, squares)
    clip = clip_coefficient(g2_norm, plan.g2_clip)
    figures = _figures(g1_squared, ahead, g2_norm, clip, fidelity)
    if plan.g2_clip is not None:
        inner, squares = clipped_moments(inner, squares, g1_squared, coefficient=clip)
    return Difference(
        inner,
        squares,
        ahead,
        second,
        is_delta=False,
        is_finite=item_on_cpu(is_finite(g2_norm)),
        losses=losses,
        clip=item_on_cpu(clip),
        figures=figures,
    )


def central_difference(storage: Storage, first: FirstGradient, plan: Plan) -> Difference:
    """Write Δ = (c₊·g₊ − c₋·g₋)/2 over g₊, and measure it."""
    for group in first.groups:  # from now on g1 is d, the clipped gradient
        multi_tensor.scale_(group.g1, first.clip)
    plus, minus = first.further.pop(Point.AHEAD), first.further.pop(Point.BEHIND)
    sides = [columns for side in (plus, minus) for columns in zip(*_moments(first, side), strict=True)]
    flat = storage.sum_over_ranks(stack_scalars([value for column in sides for value in column]))
    sums = flat.view(4, -1) / storage.loss_scale**2
    ahead, norms = sums[0], sums[1::2].sum(1).sqrt()
    clips = clip_coefficient(norms, plan.g2_clip)
    for side, clip in zip((plus, minus), clips, strict=True):
        for gradients in side:
            multi_tensor.scale_(gradients, item_on_cpu(clip))
    for written, subtracted in zip(plus, minus, strict=True):
        multi_tensor.add_(written, subtracted, factor=-1.0)
        multi_tensor.scale_(written, 0.5)
    inner, squares, losses, fidelity = summed(storage, first, _moments(first, plus))
    return Difference(
        inner,
        squares,
        ahead,
        plus,
        is_delta=True,
        is_finite=item_on_cpu(is_finite(squares.sum())),
        losses=losses,
        figures=_figures(first.g1_squared, ahead, norms[0], clips.amin(), fidelity),
    )


# ``sufficient`` was measured (benchmarks/results/2026-11-22-difference-studies/result.md). All forward
# estimates with a self-check above 0.7 were usable; most of those below 0.6 were not. In the central
# difference the errors of g1 and those of second order cancel: at a self-check of 0 it is as good as the
# forward difference at about 0.5.
_CHECKED = (Point.SIDEWAYS, Point.BEHIND, Point.AHEAD)
FORWARD = Scheme((Point.AHEAD,), _CHECKED, forward_difference, noise=1.0, sufficient=0.6)
"""Two gradients a step."""
CENTRAL = Scheme(
    (Point.BEHIND, Point.AHEAD), _CHECKED, central_difference, noise=0.5, sufficient=0.0, order=2
)
"""Three gradients a step; their rounding errors are halved in Δ."""


def _moments(first: FirstGradient, gradients: Gradients) -> list[tuple[Scalar, Scalar]]:
    """⟨g, g1⟩ and ‖g‖² of each group, over this rank's tensors."""
    pairs = [(g.counted(taken), g.counted(g.g1)) for g, taken in zip(first.groups, gradients, strict=True)]
    return [(multi_tensor.inner(taken, g1), multi_tensor.norm_squared(taken)) for taken, g1 in pairs]


def summed(
    storage: Storage, first: FirstGradient, pairs: list[tuple[Scalar, Scalar]]
) -> tuple[Tensor, Tensor, Tensor | None, Callable[[], Tensor]]:
    """Two moments of each group, the losses and the fidelity, over all ranks and without the loss scale."""
    groups, scale = first.groups, storage.loss_scale
    columns = [*zip(*pairs, strict=True), [g.moved_along for g in groups], [g.step_squared for g in groups]]
    flat = stack_scalars([value for column in columns for value in column] + first.losses)
    sums = storage.sum_over_ranks(flat)
    inner, squares, along, lengths = sums[: 4 * len(groups)].view(4, -1)
    losses = sums[4 * len(groups) :] if first.losses else None
    fidelity = partial(_fidelity, along, lengths, [group.eps for group in groups], first.clip, scale)
    if scale != 1:
        inner, squares = inner / scale**2, squares / scale**2
    return inner, squares, losses, fidelity


def _fidelity(along: Tensor, squares: Tensor, eps: list[Scalar], clip: Scalar, scale: float) -> Tensor:
    """⟨θ'_real − θ, ε·d⟩/‖ε·d‖² of d = clip·g1/scale: the share of the step that rounding left."""
    steps = stack_scalars(eps, along)
    wanted = (steps.square() * squares).sum() * clip / scale
    return torch.where(wanted == 0, 1.0, ratio((steps * along).sum(), wanted))


def _figures(
    g1_squared: Tensor, ahead: Tensor, g2_norm: Tensor, clip: Tensor, fidelity: Callable[[], Tensor]
) -> dict[str, Figure]:
    return {
        "g2_norm": g2_norm,
        "g2_clipped": partial(torch.lt, clip, 1),
        "cosine": partial(_cosine, g1_squared, ahead, g2_norm),
        "perturbation_fidelity": fidelity,
    }


def _cosine(g1_squared: Tensor, ahead: Tensor, g2_norm: Tensor) -> Tensor:
    return ratio(ahead.sum(), g1_squared.sum().sqrt() * g2_norm)


# Scalars.


def stack_scalars(values: Sequence[Scalar], like: Tensor | None = None) -> Tensor:
    """Numbers and 0-d tensors as one vector, on the device and in the widest dtype of tensors or ``like``."""
    tensors = [value for value in values if isinstance(value, Tensor)] if like is None else [like]
    dtype = max((tensor.dtype for tensor in tensors), key=lambda dtype: dtype.itemsize, default=torch.float32)
    device = tensors[0].device if tensors else torch.device("cpu")
    scalars = [
        # Copying a number to the device instead of filling in would wait for it.
        value.to(device, dtype)
        if isinstance(value, Tensor)
        else torch.full((), value, dtype=dtype, device=device)
        for value in values
    ]
    return torch.stack(scalars) if len(scalars) > 1 else scalars[0].reshape(1)


def ratio(numerator: Scalar, denominator: Tensor) -> Tensor:
    """``numerator / denominator``; 0 where the denominator is 0 (a vanishing gradient has no direction)."""
    return numerator / denominator.masked_fill(denominator == 0, torch.inf)


def is_finite(norm: Tensor) -> Tensor:
    """Whether a norm, or a square, is neither infinite nor NaN."""
    return norm < torch.inf


def clip_coefficient(norm: Tensor, max_norm: float | None) -> Tensor:
    """min(1, max_norm/(norm + 1e-6)), as in :func:`torch.nn.utils.clip_grad_norm_`; 1 without a bound."""
    if max_norm is None:
        return torch.ones_like(norm)
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def clipped_moments(
    inner: Tensor, squares: Tensor, g1_squared: Tensor, *, coefficient: Tensor
) -> tuple[Tensor, Tensor]:
    """⟨c·g2 − g1, g1⟩ and ‖c·g2 − g1‖² of a clipped g2, from the moments of g2 − g1; no pass over memory.

    With δ = g2 − g1: c·g2 − g1 = c·δ − (1 − c)·g1. The square may cancel to less than 0 by
    rounding, and is clamped.
    """
    c, rest = coefficient, 1 - coefficient
    lost = rest * g1_squared
    squares = torch.addcmul(c * torch.sub(c * squares, rest * inner, alpha=2), rest, lost).clamp(min=0)
    return c * inner - lost, squares


def length_of_sum(squares_of_first: Tensor, inner: Tensor, squares: Tensor) -> Tensor:
    """‖a + b‖ out of parts of ‖a‖², ⟨a, b⟩ and ‖b‖².

    A sum that cancels may come out below 0, and its root as NaN: it is clamped, which lets a NaN
    of the parts through.

    >>> length_of_sum(torch.tensor([9.0]), torch.tensor([0.0]), torch.tensor([16.0]))
    tensor(5.)
    """
    return torch.add(squares_of_first + squares, inner, alpha=2).sum().clamp(min=0).sqrt()


def item_on_cpu(value: Scalar) -> Scalar:
    """A Python number where reading costs nothing (CPU); the 0-d tensor where it would stall a device."""
    return value.item() if isinstance(value, Tensor) and value.device.type == "cpu" else value
