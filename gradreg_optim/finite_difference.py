"""Gradient regularization by a finite difference: the mathematics, on lists of tensors.

Objective (Ackermann et al. 2026, arXiv 2602.18037; Karakida et al. 2023, arXiv 2210.02720)

    L(θ) + (γ/2)·‖∇L(θ)‖²        with gradient        ∇L + γ·H∇L

Estimator, one extra gradient, a forward difference along the gradient

    g1 = ∇L(θ)        d = clip(g1)        θ' = θ + ε·d        g2 = ∇L(θ')
    g  = g1 + (γ/ε)·(g2 − g1)

Error: g = g1 + γ·H·d + O(γ·ε·‖d‖²), zero on a quadratic at any ε.

Symbols in the code: ``strength`` is γ, ``eps`` is ε, ``radius`` is ρ = ‖θ' − θ‖ = ε·‖d‖, ``weight`` is γ/ε, and
``delta`` is g2 − g1. Everything below is free of state. Sums run in float32 for half precision tensors and in the
tensors' own precision otherwise; scalars are 0-d tensors on the device of the data, so that nothing here waits for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = [
    "add_penalty_",
    "arrival",
    "clip_coefficient",
    "clipped_moments",
    "combine_",
    "combine_and_measure_",
    "difference_moments",
    "fused",
    "halved_difference_",
    "inner_of_differences",
    "length_of_sum",
    "moments",
    "norm_squared",
    "pieces",
    "ratio",
    "readable",
    "recombine_",
    "save_and_shift_",
    "scale_",
    "shift_",
    "stochastically_rounded",
]

Scalar = float | Tensor

BLOCK = 2**16
"""Elements that a few operations in a row find in the cache of a core."""
LARGE_BLOCK = 2**24
"""Elsewhere launching operations costs more; what they need beside the tensors is bounded all the same."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums over tensors of ``dtype`` run in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def norm_squared(tensors: Sequence[Tensor]) -> Tensor:
    """Σ‖x‖² over all ``tensors`` as one 0-d tensor (0 for an empty list).

    >>> norm_squared([torch.tensor([3.0]), torch.tensor([[4.0]])])
    tensor(25.)
    """
    if not tensors:
        return torch.zeros(())
    if fused(1.0, tensors) and len({x.dtype for x in tensors}) == 1:  # torch._foreach_norm runs on one core
        return torch.stack([torch.dot(block, block) for x in tensors for block in _blocks(x)]).sum()
    wide = max((accumulation_dtype(x.dtype) for x in tensors), key=lambda dtype: dtype.itemsize)
    norms = torch._foreach_norm(list(tensors), 2, dtype=wide)
    return torch.stack([norm.to(norms[0].device) for norm in norms]).square().sum()


def difference_moments(start: Sequence[Tensor], end: Sequence[Tensor], along: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """⟨end − start, along⟩ and ‖end − start‖², summed over the lists, as two 0-d tensors.

    The difference is taken element by element before anything is summed: inner products of the two gradients
    would cancel to noise when θ' is close to θ. It lives for one block at a time.

    >>> difference_moments([torch.tensor([1.0])], [torch.tensor([3.0])], [torch.tensor([5.0])])
    (tensor(10.), tensor(4.))
    """
    if not start:
        return torch.zeros(()), torch.zeros(())
    home = start[0].device
    inner, squares = [], []
    for tensors in zip(start, end, along, strict=True):
        wide = accumulation_dtype(tensors[0].dtype)
        for a, b, x in zip(*(_blocks(tensor) for tensor in tensors), strict=True):
            delta = b.to(wide) - a
            inner.append(torch.dot(delta, x.to(wide)).to(home))
            squares.append(torch.dot(delta, delta).to(home))
    return torch.stack(inner).sum(), torch.stack(squares).sum()


def moments(delta: Sequence[Tensor], along: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """⟨delta, along⟩ and ‖delta‖², summed over the lists: :func:`difference_moments` of a difference that is there.

    >>> moments([torch.tensor([2.0])], [torch.tensor([5.0])])
    (tensor(10.), tensor(4.))
    """
    if not delta:
        return torch.zeros(()), torch.zeros(())
    home, inner = delta[0].device, []
    for tensors in zip(delta, along, strict=True):
        wide = accumulation_dtype(tensors[0].dtype)
        for a, x in zip(*(_blocks(tensor) for tensor in tensors), strict=True):
            inner.append(torch.dot(a.to(wide), x.to(wide)).to(home))
    return torch.stack(inner).sum(), norm_squared(delta)


def inner_of_differences(
    a: Sequence[Tensor], b: Sequence[Tensor], c: Sequence[Tensor], d: Sequence[Tensor], *, scale: Scalar = 1.0
) -> Tensor:
    """⟨a − scale·b, c − scale·d⟩, summed over the lists, as one 0-d tensor; the differences live a block at a time.

    >>> inner_of_differences([torch.tensor([3.0])], [torch.tensor([1.0])], [torch.tensor([9.0])], [torch.tensor([4.0])])
    tensor(10.)
    """
    if not a:
        return torch.zeros(())
    home, products = a[0].device, []
    for tensors in zip(a, b, c, d, strict=True):
        wide = accumulation_dtype(tensors[0].dtype)
        for blocks in zip(*(_blocks(tensor) for tensor in tensors), strict=True):
            w, x, y, z = (block.to(wide) for block in blocks)
            products.append(torch.dot(w - scale * x, y - scale * z).to(home))
    return torch.stack(products).sum()


def _blocks(tensor: Tensor) -> Sequence[Tensor]:
    """Flat pieces, so small that copies of a few of them do not count; of a tensor that is not contiguous, of a copy."""
    flat = tensor.flatten()
    size = _block_size() if flat.device.type == "cpu" else LARGE_BLOCK
    return [flat] if flat.numel() <= size else torch.split(flat, size)


def _block_size() -> int:
    """Elements that the cores of a CPU, a few at most, work on together."""
    return BLOCK * min(4, torch.get_num_threads())


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same elements of each tensor as views, piece by piece; the tensors as they are if one is not contiguous.

    >>> blocks = list(pieces(torch.zeros(10**6), torch.ones(10**6)))
    >>> len(blocks) > 1, sum(len(zeros) for zeros, _ in blocks)
    (True, 1000000)
    """
    if all(tensor.is_contiguous() for tensor in tensors):
        yield from zip(*map(_blocks, tensors), strict=True)
    else:
        yield tensors


def sampled(tensor: Tensor, *, limit: int = 2**12, block: int = 64) -> Tensor:
    """A view of about ``limit`` elements, in blocks spread evenly over ``tensor``; all of a tensor that is no larger.

    >>> sampled(torch.arange(100), limit=6, block=2)
    tensor([[ 0,  1],
            [33, 34],
            [66, 67]])
    """
    flat = tensor.flatten()
    return flat if flat.numel() <= limit else flat.unfold(0, block, flat.numel() // (limit // block))[: limit // block]


def arrival(start: Sequence[Tensor], end: Sequence[Tensor], direction: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """⟨end − start, d⟩ and ‖d‖², from which to tell how much of a step along ``direction`` the weights' dtype let through.

    Of large tensors a sample is enough for that (:func:`sampled`), and spares a pass over memory.
    """
    if len({(x.dtype, x.device) for x in direction}) == 1:  # one long sample costs less than many short ones
        start, end, direction = ([torch.cat([sampled(x).flatten() for x in xs])] for xs in (start, end, direction))
    return difference_moments(start, end, direction)[0], norm_squared(direction)


def ratio(numerator: Scalar, denominator: Tensor) -> Tensor:
    """``numerator / denominator``, and 0 where the denominator is 0 (a vanishing gradient has no direction)."""
    return torch.where(denominator == 0, torch.zeros_like(denominator), numerator / denominator)


def clip_coefficient(norm: Tensor, max_norm: float | None) -> Tensor:
    """The factor min(1, max_norm / (norm + 1e-6)) of :func:`torch.nn.utils.clip_grad_norm_`; 1 without a bound."""
    if max_norm is None:
        return torch.ones_like(norm)
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def clipped_moments(inner: Tensor, squares: Tensor, g1_squared: Tensor, *, coefficient: Tensor) -> tuple[Tensor, Tensor]:
    """⟨c·g2 − g1, g1⟩ and ‖c·g2 − g1‖² of a clipped g2, from those of g2 − g1 and without another pass over memory.

    With δ = g2 − g1: c·g2 − g1 = c·δ − (1 − c)·g1. The square may cancel to less than 0 by rounding, and is clamped.
    """
    c = coefficient
    squares = (c**2 * squares - 2 * c * (1 - c) * inner + (1 - c) ** 2 * g1_squared).clamp(min=0)
    return c * inner - (1 - c) * g1_squared, squares


def length_of_sum(squares_of_first: Tensor, inner: Tensor, squares: Tensor) -> Tensor:
    """‖a + b‖ out of parts of ‖a‖², ⟨a, b⟩ and ‖b‖².

    A sum that cancels may come out below 0, and its root as NaN: it is clamped, which lets a NaN of the parts through.

    >>> length_of_sum(torch.tensor([9.0]), torch.tensor([0.0]), torch.tensor([16.0]))
    tensor(5.)
    """
    return (squares_of_first + 2 * inner + squares).sum().clamp(min=0).sqrt()


def readable(value: Scalar) -> Scalar:
    """A Python number where reading costs nothing (CPU), and the 0-d tensor itself where it would stall a device."""
    return value.item() if isinstance(value, Tensor) and value.device.type == "cpu" else value


def scale_(tensors: Sequence[Tensor], factor: Scalar) -> None:
    """``x ← factor·x`` in place; free when the factor is known to be 1."""
    if tensors and not (isinstance(factor, float) and factor == 1.0):
        torch._foreach_mul_(list(tensors), factor)


def stochastically_rounded(values: Tensor, generator: torch.Generator) -> Tensor:
    """Float32 ``values`` as bfloat16, each rounded up or down with the probability that makes it right on average.

    bfloat16 is the upper half of float32: random bits are added below the cut, and cut off with the rest.
    """
    words = torch.empty((values.numel() + 3) // 4, dtype=torch.int64, device=values.device)
    words.random_(-(2**63), None, generator=generator)  # one draw for four elements, a fourth of the time on a CPU
    noise = words.view(torch.int16)[: values.numel()].to(torch.int32).bitwise_and_(2**16 - 1).view(values.shape)
    return noise.add_(values.view(torch.int32)).bitwise_and_(-(2**16)).view(torch.float32).to(torch.bfloat16)


def shift_(
    weights: Sequence[Tensor], direction: Sequence[Tensor], *, eps: Scalar, generator: torch.Generator | None = None
) -> None:
    """``θ ← θ + ε·d`` in place, each element rounded to the nearest value of the weights' dtype.

    With a ``generator``, bfloat16 weights are rounded stochastically: of steps shorter than half a spacing, which rounding
    to nearest drops altogether, the right share then arrives on average.

    >>> w = torch.tensor([1.0]); shift_([w], [torch.tensor([2.0])], eps=0.5); w
    tensor([2.])
    """
    if not weights:  # torch._foreach_* refuses empty lists, which a group without gradients has
        return
    if generator is not None:
        coarse = [pair for pair in zip(weights, direction, strict=True) if pair[0].dtype == torch.bfloat16]
        for weight, along in (blocks for pair in coarse for blocks in pieces(*pair)):
            weight.copy_(stochastically_rounded(weight.float().add_(along.float() * eps), generator))
        fine = [pair for pair in zip(weights, direction, strict=True) if pair[0].dtype != torch.bfloat16]
        weights, direction = [weight for weight, _ in fine], [along for _, along in fine]
        if not weights:
            return
    if not isinstance(eps, Tensor):
        torch._foreach_add_(list(weights), list(direction), alpha=eps)
        return
    for weight, along in zip(weights, direction, strict=True):  # ``alpha=`` takes Python numbers only
        if weight.dtype.itemsize >= torch.float32.itemsize:
            weight.addcmul_(along, eps.to(weight.dtype))
            continue
        for block, part in pieces(weight, along):
            block.copy_(block.float().add_(part.float() * eps))


def save_and_shift_(weights: Sequence[Tensor], direction: Sequence[Tensor], *, eps: float) -> list[Tensor]:
    """Copies of θ, and :func:`shift_`, in one pass over memory, for tensors that are :func:`fused`.

    If it is interrupted, θ is as it was.
    """
    saved = [torch.empty_like(weight) for weight in weights]
    done = []
    try:
        for tensors in zip(weights, saved, direction, strict=True):
            for weight, copy, along in zip(*map(_blocks, tensors), strict=True):
                copy.copy_(weight)
                done.append((weight, copy))
                weight.add_(along, alpha=eps)
    except BaseException:
        for weight, copy in done:
            weight.copy_(copy)
        raise
    return saved


def combine_(g1: Sequence[Tensor], g2: Sequence[Tensor], *, weight: Scalar) -> None:
    """``g2 ← g1 + weight·(g2 − g1)`` in place.

    Written as g2 + (1 − weight)·(g1 − g2), so that weight 1 (γ = ε, sharpness-aware minimization) leaves exactly g2
    and weight 0 exactly g1.

    >>> g = torch.tensor([3.0]); combine_([torch.tensor([1.0])], [g], weight=10.0); g
    tensor([21.])
    """
    if not g2:
        return
    if isinstance(weight, Tensor):  # a scalar that nobody has read yet: three passes instead of one
        torch._foreach_sub_(list(g2), list(g1))
        torch._foreach_mul_(list(g2), weight)
        torch._foreach_add_(list(g2), list(g1))
    else:
        torch._foreach_lerp_(list(g2), list(g1), 1.0 - weight)


def fused(weight: Scalar, *groups: Sequence[Tensor]) -> bool:
    """Whether several operations on these tensors can run block by block while a block is in the cache of a CPU."""
    return (
        isinstance(weight, float)
        and weight != 0
        and all(
            x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and x.is_contiguous()
            for tensors in groups
            for x in tensors
        )
    )


def combine_and_measure_(g1: Sequence[Tensor], g2: Sequence[Tensor], *, weight: float) -> tuple[Tensor, Tensor]:
    """:func:`combine_` and :func:`difference_moments` in one pass over memory, for tensors that are :func:`fused`.

    >>> g = torch.tensor([3.0]); combine_and_measure_([torch.tensor([1.0])], [g], weight=10.0), g
    ((tensor(2.), tensor(4.)), tensor([21.]))
    """
    if not g2:
        return torch.zeros(()), torch.zeros(())
    inner, squares = [], []
    room = torch.empty(_block_size(), dtype=g2[0].dtype)
    for a, b in ((a, b) for tensors in zip(g1, g2, strict=True) for a, b in zip(*map(_blocks, tensors), strict=True)):
        if room.dtype != b.dtype:
            room = torch.empty(_block_size(), dtype=b.dtype)
        delta = torch.sub(b, a, out=room[: b.numel()])
        inner.append(torch.dot(delta, a))
        squares.append(torch.dot(delta, delta))
        b.lerp_(a, 1.0 - weight)
    return torch.stack(inner).sum(), torch.stack(squares).sum()


def recombine_(g1: Sequence[Tensor], g: Sequence[Tensor], *, before: float, weight: float, coefficient: float) -> None:
    """``g ← g1 + weight·(coefficient·g2 − g1)`` in place, where g is ``g1 + before·(g2 − g1)``.

    >>> g = torch.tensor([21.0]); recombine_([torch.tensor([1.0])], [g], before=10.0, weight=5.0, coefficient=0.5); g
    tensor([3.5000])
    """
    if g:
        factor = weight * coefficient / before
        torch._foreach_mul_(list(g), factor)
        torch._foreach_add_(list(g), list(g1), alpha=1.0 - weight * (1.0 - coefficient) - factor)


def halved_difference_(plus: Sequence[Tensor], minus: Sequence[Tensor]) -> None:
    """``plus ← (plus − minus)/2`` in place: the central difference times ε.

    >>> g = torch.tensor([3.0]); halved_difference_([g], [torch.tensor([1.0])]); g
    tensor([1.])
    """
    if plus:
        torch._foreach_sub_(list(plus), list(minus))
        torch._foreach_mul_(list(plus), 0.5)


def add_penalty_(g1: Sequence[Tensor], delta: Sequence[Tensor], *, weight: Scalar) -> None:
    """``delta ← g1 + weight·delta`` in place.

    >>> d = torch.tensor([3.0]); add_penalty_([torch.tensor([1.0])], [d], weight=2.0); d
    tensor([7.])
    """
    if delta:
        torch._foreach_mul_(list(delta), weight)
        torch._foreach_add_(list(delta), list(g1))
