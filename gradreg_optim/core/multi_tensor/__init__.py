"""Passes over memory: the operations on lists of tensors of which a step consists.

    norm_squared          ‖g‖²
    save_and_shift_       θ ← θ + ε·d, and copies of θ
    restore_              θ, from the copies
    moments_              ⟨g2 − g1, g1⟩ and ‖g2 − g1‖²
    combine_              g2 ← g1 + weight·(clip·g2 − g1)

They take any device and dtype, several in one list too. A back end has seven functions: ``fit`` says which
tensors it takes, ``norm_squared``, ``save_and_shift_``, ``shift_``, ``copy_``, ``moments_`` and ``combine_``
are the operations on tensors of one dtype and device. :mod:`triton_kernels` does each operation in one launch
on a GPU, and :mod:`eager` serves all else. Sums run in float32 for half-precision tensors and in the tensors'
own precision otherwise; results are 0-d tensors on the device of the data, which nothing here waits for, and
the number 0 for empty lists.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gradreg_optim.core.multi_tensor import eager
from gradreg_optim.core.multi_tensor.eager import sampled as sampled
from gradreg_optim.core.multi_tensor.eager import with_signs

Scalar = float | Tensor
Moments = tuple[Scalar, Scalar]

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's interpreter runs the kernels on a CPU, for tests."""


@cache
def _kernels() -> Any:
    """The Triton back end, if Triton is there and works, else ``None``."""
    try:
        from gradreg_optim.core.multi_tensor import triton_kernels

        if torch.cuda.is_available():
            triton_kernels.norm_squared([torch.zeros(1, device="cuda")])
    except ImportError:
        return None
    except Exception as error:  # whatever a compiler may raise
        warnings.warn(
            "Gradient regularization: Triton does not work here, so that each step takes more kernel "
            f"launches: {type(error).__name__}: {error}",
            stacklevel=2,
        )
        return None
    return triton_kernels


def _alike(*lists: Sequence[Tensor]) -> list[tuple[Any, list[Sequence[Tensor]]]]:
    """The lists, divided by dtype and device, as pairs of a back end and lists for it."""
    if not lists[0]:
        return []
    if all(len({x.dtype for x in xs}) == 1 and len({x.device for x in xs}) == 1 for xs in lists):
        kernels = _kernels_for([xs[0] for xs in lists])
        if kernels is None or all(map(kernels.fit, lists)):
            return [(kernels or eager, list(lists))]
    found: dict[Any, list[list[Tensor]]] = {}
    for tensors in zip(*lists, strict=True):
        kernels = _kernels_for(tensors)
        back_end = kernels if kernels is not None and kernels.fit(tensors) else eager
        parts = found.setdefault((back_end, *((x.dtype, x.device) for x in tensors)), [[] for _ in lists])
        for part, tensor in zip(parts, tensors, strict=True):
            part.append(tensor)
    return [(key[0], list(parts)) for key, parts in found.items()]


def _kernels_for(tensors: Sequence[Tensor]) -> Any:
    """The Triton back end, if these tensors are on one device that it works on; else ``None``."""
    device = tensors[0].device
    is_served = device.type == "cuda" or (device.type == "cpu" and IS_INTERPRETED)
    return _kernels() if is_served and all(x.device == device for x in tensors) else None


# Sums.


def _added(sums: list[Tensor]) -> Scalar:
    """The sum, in the widest dtype and on the device of the first; the number 0 for an empty list."""
    if len(sums) < 2:
        return sums[0] if sums else 0.0
    wide = max((x.dtype for x in sums), key=lambda dtype: dtype.itemsize)
    return torch.stack([x.to(sums[0].device, wide) for x in sums]).sum()


def _all_added(moments: Sequence[tuple[Tensor, Tensor] | None]) -> Moments | None:
    """The sums of both, unless some are not known."""
    known = [pair for pair in moments if pair is not None]
    return (
        (_added([a for a, _ in known]), _added([b for _, b in known])) if len(known) == len(moments) else None
    )


def norm_squared(tensors: Sequence[Tensor]) -> Scalar:
    """Σ‖x‖² over all ``tensors`` as one 0-d tensor.

    >>> norm_squared([torch.tensor([3.0]), torch.tensor([[4.0]])])
    tensor(25.)
    """
    return _added([back_end.norm_squared(alike) for back_end, (alike,) in _alike(tensors)])


def moments_(g1: Sequence[Tensor], g2: Sequence[Tensor], *, scale: Scalar = 1.0) -> Moments:
    """``g1 ← scale·g1`` in place, then ⟨g2 − g1, g1⟩ and ‖g2 − g1‖², summed over the lists.

    The difference is taken element by element before anything is summed: inner products of the two gradients
    would cancel to noise when θ' is close to θ.

    >>> moments_([torch.tensor([1.0])], [torch.tensor([3.0])])
    (tensor(2.), tensor(4.))
    """
    found = [back_end.moments_(*alike, scale=scale) for back_end, alike in _alike(g1, g2)]
    return _added([inner for inner, _ in found]), _added([squares for _, squares in found])


def moments_along(delta: Sequence[Tensor], along: Sequence[Tensor]) -> Moments:
    """⟨delta, along⟩ and ‖delta‖², as two 0-d tensors.

    >>> moments_along([torch.tensor([2.0])], [torch.tensor([5.0])])
    (tensor(10.), tensor(4.))
    """
    return _added([eager.inner(*alike) for _, alike in _alike(delta, along)]), norm_squared(delta)


def step_moments(start: Sequence[Tensor], end: Sequence[Tensor], direction: Sequence[Tensor]) -> Moments:
    """⟨end − start, d⟩ and ‖d‖²: how much of a step along ``direction`` survived the weights' dtype.

    A sample of a large tensor is enough for that (:func:`eager.sampled`), and saves a pass over memory.
    """
    found = [eager.step_moments(*alike) for _, alike in _alike(start, end, direction)]
    return _added([along for along, _ in found]), _added([squares for _, squares in found])


def inner_of_differences(start: Sequence[Tensor], left: Sequence[Tensor], right: Sequence[Tensor]) -> Scalar:
    """⟨left − start, right − start⟩ as one 0-d tensor; the differences live a chunk at a time.

    >>> inner_of_differences([torch.tensor([1.0])], [torch.tensor([3.0])], [torch.tensor([6.0])])
    tensor(10.)
    """
    return _added([eager.inner_of_differences(*alike) for _, alike in _alike(start, left, right)])


# Weights.


def of_group(seed: int | None, number: int) -> int | None:
    """The seed of a parameter group, given that of a step; ``None`` stays ``None``."""
    return None if seed is None else (seed << 40) + (number << 24)


def save_and_shift_(
    weights: Sequence[Tensor],
    direction: Sequence[Tensor],
    *,
    eps: Scalar,
    seed: int | None = None,
    signs: int | None = None,
) -> tuple[list[Tensor], Moments | None]:
    """``θ ← θ + ε·d`` in place, rounded to nearest in the weights' dtype; θ is unchanged if it raises.

    With a ``seed``, bfloat16 weights are rounded up or down with the probability that is right on average: of
    steps shorter than half a spacing, which rounding to nearest drops altogether, the right share then
    arrives. With ``signs``, another seed, the elements of d take random signs and other places.

    Returns:
        copies of θ; and ⟨θ' − θ, d⟩ and ‖d‖² where they cost nothing, see :func:`step_moments`.

    >>> w = torch.tensor([1.0]); save_and_shift_([w], [torch.tensor([2.0])], eps=0.5), w
    (([tensor([1.])], None), tensor([2.]))
    """
    if signs is not None:
        saved = [weight.clone() for weight in weights]
        try:
            return saved, shift_(weights, direction, eps=eps, seed=seed, signs=signs)
        except BaseException:
            restore_(weights, saved)
            raise
    saved = [torch.empty_like(weight) for weight in weights]
    done: list[Sequence[Sequence[Tensor]]] = []
    try:
        arrived = []
        for number, (back_end, alike) in enumerate(_alike(weights, saved, direction)):
            seed_of_part = None if seed is None else seed + (number << 18)
            arrived.append(back_end.save_and_shift_(*alike, eps=eps, seed=seed_of_part))
            done.append(alike)
        return saved, _all_added(arrived)
    except BaseException:
        for moved, copies, _ in done:
            restore_(moved, copies)
        raise


def shift_(
    weights: Sequence[Tensor],
    direction: Sequence[Tensor],
    *,
    eps: Scalar,
    start: Sequence[Tensor] | None = None,
    seed: int | None = None,
    signs: int | None = None,
) -> Moments | None:
    """``θ ← start + ε·d``, where ``start`` may be masters in another dtype or on another device.

    Seeds and result as in :func:`save_and_shift_`; with ``signs`` nothing is measured.
    """
    if signs is not None:
        for (along, moved, origin), key in with_signs(
            direction, weights, weights if start is None else start, seed=signs
        ):
            shift_([moved], [along], eps=eps, start=[origin], seed=None if seed is None else seed + key)
        return None
    parts = _alike(weights, direction) if start is None else _alike(weights, direction, start)
    return _all_added([back_end.shift_(*alike, eps=eps, seed=seed) for back_end, alike in parts])


def restore_(weights: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
    """θ again, bit for bit, also if an interrupt hits the copy."""
    parts = _alike(weights, saved)
    try:
        for back_end, (moved, copies) in parts:
            back_end.copy_(moved, copies)
    except BaseException:
        for back_end, (moved, copies) in parts:
            back_end.copy_(moved, copies)
        raise


# Gradients in place.


def scale_(tensors: Sequence[Tensor], factor: Scalar) -> None:
    """``x ← factor·x`` in place; free when the factor is known to be 1."""
    if tensors:  # torch._foreach_* refuses empty lists, which a group without gradients has
        eager.scale_(tensors, factor)


def subtract_(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """``x ← x − y`` in place."""
    if tensors:
        torch._foreach_sub_(list(tensors), list(others))


def combine_(
    g1: Sequence[Tensor],
    g2: Sequence[Tensor],
    *,
    weight: Scalar,
    clip: Scalar = 1.0,
    is_finite: Scalar = True,
) -> None:
    """``g2 ← g1 + weight·(clip·g2 − g1)`` in place, or g1 where ``is_finite`` (perhaps a tensor) is false.

    Written as g2 + (1 − weight)·(g1 − g2) near weight 1 (γ = ε, sharpness-aware minimization), which leaves
    exactly g2; weight 0 leaves exactly g1.

    >>> g = torch.tensor([3.0]); combine_([torch.tensor([1.0])], [g], weight=10.0); g
    tensor([21.])
    """
    for back_end, (firsts, seconds) in _alike(g1, g2):
        back_end.combine_(firsts, seconds, weight=weight, clip=clip, is_finite=is_finite)


def choose_(condition: Tensor, tensors: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """``x ← x if condition else y`` in place, for a condition that nobody has read."""
    for _, alike in _alike(tensors, others):
        eager.choose_(condition, *alike)


def add_penalty_(g1: Sequence[Tensor], delta: Sequence[Tensor], *, weight: Scalar) -> None:
    """``delta ← g1 + weight·delta`` in place.

    >>> d = torch.tensor([3.0]); add_penalty_([torch.tensor([1.0])], [d], weight=2.0); d
    tensor([7.])
    """
    if delta:
        torch._foreach_mul_(list(delta), weight)
        torch._foreach_add_(list(delta), list(g1))
