"""Several operations in a row on a block of memory while it is in the cache of a CPU: float32 and float64, contiguous."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

BLOCK = 2**16
"""Elements that a few operations in a row find in the cache of a core."""


def fit(scalar: float | Tensor, *groups: Sequence[Tensor]) -> bool:
    """Whether ``scalar`` is a number other than 0, and these tensors can be worked on block by block."""
    return (
        isinstance(scalar, float)
        and scalar != 0
        and all(
            x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and x.is_contiguous()
            for tensors in groups
            for x in tensors
        )
        and len({x.dtype for tensors in groups for x in tensors}) == 1
    )


def block_size() -> int:
    """Elements that the cores of a CPU, a few at most, work on together."""
    return BLOCK * min(4, torch.get_num_threads())


def cut(tensors: Sequence[Tensor], size: int) -> Iterable[Sequence[Tensor]]:
    """Flat views of ``size`` elements of each of the tensors, which have one shape; themselves if one is not contiguous."""
    if not all(x.is_contiguous() for x in tensors):
        return [tensors]
    return zip(*(torch.split(x.view(-1), size) for x in tensors), strict=True)


def norm_squared(tensors: Sequence[Tensor]) -> Tensor:
    """On all cores, where torch._foreach_norm runs on one."""
    return torch.stack([torch.dot(block, block) for x in tensors for (block,) in cut([x], block_size())]).sum()


def save_and_shift_(weights: Sequence[Tensor], direction: Sequence[Tensor], *, eps: float) -> list[Tensor]:
    """Copies of θ and ``θ ← θ + ε·d`` in one pass over memory."""
    saved = [torch.empty_like(weight) for weight in weights]
    done = []
    try:
        for tensors in zip(weights, saved, direction, strict=True):
            for weight, copy, along in cut(tensors, block_size()):
                copy.copy_(weight)
                done.append((weight, copy))
                weight.add_(along, alpha=eps)
    except BaseException:
        for weight, copy in done:
            weight.copy_(copy)
        raise
    return saved


def combine_and_measure_(g1: Sequence[Tensor], g2: Sequence[Tensor], *, weight: float) -> tuple[Tensor, Tensor]:
    """⟨g2 − g1, g1⟩ and ‖g2 − g1‖², and ``g2 ← g1 + weight·(g2 − g1)``, in one pass over memory.

    >>> g = torch.tensor([3.0]); combine_and_measure_([torch.tensor([1.0])], [g], weight=10.0), g
    ((tensor(2.), tensor(4.)), tensor([21.]))
    """
    inner, squares = [], []
    room = torch.empty(block_size(), dtype=g2[0].dtype)
    for a, b in (views for tensors in zip(g1, g2, strict=True) for views in cut(tensors, block_size())):
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
    factor = weight * coefficient / before
    torch._foreach_mul_(list(g), factor)
    torch._foreach_add_(list(g), list(g1), alpha=1.0 - weight * (1.0 - coefficient) - factor)
