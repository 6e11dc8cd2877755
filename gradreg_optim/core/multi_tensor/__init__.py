"""Passes over memory: the operations on lists of tensors of which a step consists.

    norm_squared          ‖g‖²
    save_and_shift_       θ ← θ + ε·d, and copies of θ
    restore_              θ, from the copies
    moments               ⟨g2 − g1, g1⟩ and ‖g2 − g1‖²
    combine_              g2 ← g1 + weight·(clip·g2 − g1)

They take any device and dtype: with torch._foreach_* where that can be, else chunk by chunk. Where the tensors fit,
:mod:`~gradreg_optim.core.multi_tensor.blocks` does several operations in one pass over memory. Sums run in float32 for
half-precision tensors and in the tensors' own precision otherwise; results are 0-d tensors on the device of the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from gradreg_optim.core.multi_tensor import blocks

Scalar = float | Tensor

CHUNK = 2**24
"""Elements a chunk. Larger chunks need fewer kernel launches, and more memory for intermediate results."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums over tensors of ``dtype`` run in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _flat_chunks(tensor: Tensor) -> Sequence[Tensor]:
    """Flat chunks, small enough that copies of a few of them cost no memory; of a copy, if ``tensor`` is not contiguous."""
    flat = tensor.flatten()
    size = blocks.block_size() if flat.device.type == "cpu" else CHUNK
    return [flat] if flat.numel() <= size else torch.split(flat, size)


def chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same elements of each tensor as views, chunk by chunk; the tensors as they are if one is not contiguous.

    >>> found = list(chunks(torch.zeros(10**6), torch.ones(10**6)))
    >>> len(found) > 1, sum(len(zeros) for zeros, _ in found)
    (True, 1000000)
    """
    if all(tensor.is_contiguous() for tensor in tensors):
        yield from zip(*map(_flat_chunks, tensors), strict=True)
    else:
        yield tensors


# Sums.


def _sums(of_chunk: Callable[..., list[Tensor]], *lists: Sequence[Tensor]) -> list[Tensor]:
    """What ``of_chunk`` returns for the same elements of each list, summed over all chunks, on the device of the first."""
    found: list[list[Tensor]] = []
    for tensors in zip(*lists, strict=True):
        wide = accumulation_dtype(tensors[0].dtype)
        found += [of_chunk(*(part.to(wide) for part in parts)) for parts in zip(*map(_flat_chunks, tensors), strict=True)]
    home = lists[0][0].device
    return [torch.stack([value.to(home) for value in column]).sum() for column in zip(*found, strict=True)]


def norm_squared(tensors: Sequence[Tensor]) -> Tensor:
    """Σ‖x‖² over all ``tensors`` as one 0-d tensor (0 for an empty list).

    >>> norm_squared([torch.tensor([3.0]), torch.tensor([[4.0]])])
    tensor(25.)
    """
    if not tensors:
        return torch.zeros(())
    if blocks.fit(1.0, tensors):  # on all cores, where torch._foreach_norm runs on one
        return blocks.norm_squared(tensors)
    wide = max((accumulation_dtype(x.dtype) for x in tensors), key=lambda dtype: dtype.itemsize)
    norms = torch._foreach_norm(list(tensors), 2, dtype=wide)
    return torch.stack([norm.to(norms[0].device) for norm in norms]).square().sum()


def moments(
    g1: Sequence[Tensor], g2: Sequence[Tensor], *, likely_weight: Scalar | None = None
) -> tuple[Tensor, Tensor, float | None]:
    """⟨g2 − g1, g1⟩ and ‖g2 − g1‖², summed over the lists.

    The difference is taken element by element before anything is summed: inner products of the two gradients would cancel
    to noise when θ' is close to θ. Where that saves a pass over memory, :func:`combine_` with ``likely_weight`` is done as
    well, and the weight returned as the third result.

    >>> moments([torch.tensor([1.0])], [torch.tensor([3.0])])
    (tensor(2.), tensor(4.), None)
    """
    if not g2:
        return torch.zeros(()), torch.zeros(()), None
    if likely_weight is not None and blocks.fit(likely_weight, g1, g2):
        return *blocks.combine_and_measure_(g1, g2, weight=float(likely_weight)), float(likely_weight)

    def of_chunk(first: Tensor, second: Tensor) -> list[Tensor]:
        delta = second - first
        return [torch.dot(delta, first), torch.dot(delta, delta)]

    inner, squares = _sums(of_chunk, g1, g2)
    return inner, squares, None


def moments_along(delta: Sequence[Tensor], along: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """⟨delta, along⟩ and ‖delta‖², as two 0-d tensors (0 for empty lists).

    >>> moments_along([torch.tensor([2.0])], [torch.tensor([5.0])])
    (tensor(10.), tensor(4.))
    """
    if not delta:
        return torch.zeros(()), torch.zeros(())
    (inner,) = _sums(lambda x, y: [torch.dot(x, y)], delta, along)
    return inner, norm_squared(delta)


def inner_of_differences(start: Sequence[Tensor], left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """⟨left − start, right − start⟩ as one 0-d tensor (0 for empty lists); the differences live a chunk at a time.

    >>> inner_of_differences([torch.tensor([1.0])], [torch.tensor([3.0])], [torch.tensor([6.0])])
    tensor(10.)
    """
    if not start:
        return torch.zeros(())
    (product,) = _sums(lambda a, b, c: [torch.dot(b - a, c - a)], start, left, right)
    return product


def sampled(tensor: Tensor, *, limit: int = 2**12, block: int = 64) -> Tensor:
    """A view of about ``limit`` elements, in blocks spread evenly over ``tensor``; all of a tensor that is no larger.

    >>> sampled(torch.arange(100), limit=6, block=2)
    tensor([[ 0,  1],
            [33, 34],
            [66, 67]])
    """
    flat = tensor.flatten()
    return flat if flat.numel() <= limit else flat.unfold(0, block, flat.numel() // (limit // block))[: limit // block]


def step_moments(start: Sequence[Tensor], end: Sequence[Tensor], direction: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """⟨end − start, d⟩ and ‖d‖², from which to tell how much of a step along ``direction`` the weights' dtype let through.

    Of large tensors a sample is enough for that (:func:`sampled`), and spares a pass over memory. 0 for empty lists.
    """
    if not direction:
        return torch.zeros(()), torch.zeros(())
    start, end, direction = ([sampled(x).flatten() for x in xs] for xs in (start, end, direction))
    if len({(x.dtype, x.device) for x in direction}) == 1:  # one long sample costs less than many short ones
        start, end, direction = ([torch.cat(xs)] for xs in (start, end, direction))
    (along,) = _sums(lambda a, b, x: [torch.dot(b - a, x)], start, end, direction)
    return along, norm_squared(direction)


# In place.


def scale_(tensors: Sequence[Tensor], factor: Scalar) -> None:
    """``x ← factor·x`` in place; free when the factor is known to be 1."""
    if tensors and not (isinstance(factor, float) and factor == 1.0):
        torch._foreach_mul_(list(tensors), factor)


def add_(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """``x ← x + y`` in place."""
    if tensors:  # torch._foreach_* refuses empty lists, which a group without gradients has
        torch._foreach_add_(list(tensors), list(others))


def subtract_(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """``x ← x − y`` in place."""
    if tensors:
        torch._foreach_sub_(list(tensors), list(others))


def choose_(condition: Tensor, tensors: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """``x ← x if condition else y`` in place, for a condition that nobody has read."""
    for tensor, other in zip(tensors, others, strict=True):
        torch.where(condition, tensor, other, out=tensor)


def combine_(
    g1: Sequence[Tensor], g2: Sequence[Tensor], *, weight: Scalar, clip: Scalar = 1.0, combined_with: float | None = None
) -> None:
    """``g2 ← g1 + weight·(clip·g2 − g1)`` in place, where g2 is ``g1 + combined_with·(g2 − g1)`` already, if that is given.

    Written as g2 + (1 − weight)·(g1 − g2), so that weight 1 (γ = ε, sharpness-aware minimization) leaves exactly g2
    and weight 0 exactly g1.

    >>> g = torch.tensor([3.0]); combine_([torch.tensor([1.0])], [g], weight=10.0); g
    tensor([21.])
    """
    if not g2 or (combined_with is not None and (weight, clip) == (combined_with, 1.0)):
        return
    if combined_with is not None:
        blocks.recombine_(g1, g2, before=combined_with, weight=float(weight), coefficient=float(clip))
        return
    scale_(g2, clip)
    if isinstance(weight, Tensor):  # a scalar that nobody has read yet: three passes instead of one
        torch._foreach_sub_(list(g2), list(g1))
        torch._foreach_mul_(list(g2), weight)
        torch._foreach_add_(list(g2), list(g1))
    else:
        torch._foreach_lerp_(list(g2), list(g1), 1.0 - weight)


def add_penalty_(g1: Sequence[Tensor], delta: Sequence[Tensor], *, weight: Scalar) -> None:
    """``delta ← g1 + weight·delta`` in place.

    >>> d = torch.tensor([3.0]); add_penalty_([torch.tensor([1.0])], [d], weight=2.0); d
    tensor([7.])
    """
    if delta:
        torch._foreach_mul_(list(delta), weight)
        torch._foreach_add_(list(delta), list(g1))


def save_and_shift_(
    weights: Sequence[Tensor], direction: Sequence[Tensor], *, eps: Scalar, seed: int | None = None
) -> list[Tensor]:
    """``θ ← θ + ε·d`` in place, rounded to the nearest values of the weights' dtype; copies of θ. If it raises, θ is whole.

    With a ``seed``, bfloat16 weights are rounded up or down with the probability that is right on average: of steps shorter
    than half a spacing, which rounding to nearest drops altogether, the right share then arrives.

    >>> w = torch.tensor([1.0]); save_and_shift_([w], [torch.tensor([2.0])], eps=0.5), w
    ([tensor([1.])], tensor([2.]))
    """
    if not weights:
        return []
    if blocks.fit(eps, weights, direction):
        return blocks.save_and_shift_(weights, direction, eps=float(eps))
    saved = [weight.clone() for weight in weights]
    try:
        shift_(weights, direction, eps=eps, seed=seed)
    except BaseException:
        restore_(weights, saved)
        raise
    return saved


def restore_(weights: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
    """θ again, bit for bit, also if an interrupt hits the copy."""
    if not weights:
        return
    try:
        torch._foreach_copy_(list(weights), list(saved))
    except BaseException:
        torch._foreach_copy_(list(weights), list(saved))
        raise


def shift_(weights: Sequence[Tensor], direction: Sequence[Tensor], *, eps: Scalar, seed: int | None = None) -> None:
    """``θ ← θ + ε·d`` in place; with a ``seed``, bfloat16 weights are rounded stochastically."""
    pairs = list(zip(weights, direction, strict=True))
    if seed is not None:
        generator = torch.Generator(weights[0].device).manual_seed(seed)
        moved = torch.empty(0, device=weights[0].device)
        for weight, along in (parts for pair in pairs if pair[0].dtype == torch.bfloat16 for parts in chunks(*pair)):
            moved = moved.resize_(weight.shape).copy_(weight)  # memory that is used again is in the cache
            if isinstance(eps, Tensor):
                moved.addcmul_(along.float(), eps.float())
            else:
                moved.add_(along, alpha=eps)
            weight.copy_(stochastically_rounded_(moved, generator))
        pairs = [pair for pair in pairs if pair[0].dtype != torch.bfloat16]
    if not isinstance(eps, Tensor):
        if pairs:
            torch._foreach_add_([weight for weight, _ in pairs], [along for _, along in pairs], alpha=eps)
        return
    for weight, along in pairs:  # ``alpha=`` takes Python numbers only
        if weight.dtype.itemsize >= torch.float32.itemsize:
            weight.addcmul_(along, eps.to(weight.dtype))
            continue
        for part, step in chunks(weight, along):
            part.copy_(part.float().add_(step.float() * eps))


def stochastically_rounded_(values: Tensor, generator: torch.Generator) -> Tensor:
    """Round contiguous float32 ``values`` in place to values of bfloat16, up or down so that they are right on average.

    bfloat16 is the upper half of float32: random bits are added below the cut, and cut off with the rest.
    """
    words = torch.empty((values.numel() + 3) // 4, dtype=torch.int64, device=values.device)
    words.random_(-(2**63), None, generator=generator)  # one draw for four elements, a fourth of the time on a CPU
    bits = values.view(-1).view(torch.int32)
    bits.add_(words.view(torch.int16)[: values.numel()]).add_(2**15)  # from −2¹⁵..2¹⁵−1 to 0..2¹⁶−1
    bits.bitwise_and_(-(2**16))
    return values
