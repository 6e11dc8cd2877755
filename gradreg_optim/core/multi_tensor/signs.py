"""A direction of the same length that leads elsewhere: the elements of d with random signs, a piece at a time."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

PIECE = 2**24
"""Elements whose signs are in memory at a time."""


def with_signs(direction: Sequence[Tensor], *others: Sequence[Tensor], seed: int) -> Iterator[tuple[list[Tensor], int]]:
    """Pieces of the lists, the first with random signs, and a number that is drawn for each.

    The signs of a tensor depend on the seed, its place in the list and its shape: ranks whose other tensors differ draw the
    same for the one that they share. A tensor that is not contiguous stays whole.

    >>> [(pieces, _)] = with_signs([torch.ones(6)], [torch.zeros(6)], seed=0); pieces[0].abs(), pieces[1]
    (tensor([1., 1., 1., 1., 1., 1.]), tensor([0., 0., 0., 0., 0., 0.]))
    """
    for place, tensors in enumerate(zip(direction, *others, strict=True)):
        draws = random.Random(seed + place)  # torch's generator on a CPU takes 32 bits of a seed alone
        can_be_cut = all(x.is_contiguous() for x in tensors)
        for pieces in zip(*(x.view(-1).split(PIECE) if can_be_cut else [x] for x in tensors), strict=True):
            generator = torch.Generator(pieces[0].device).manual_seed(draws.getrandbits(32))
            signs = torch.empty_like(pieces[0]).bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
            yield [signs.mul_(pieces[0]), *pieces[1:]], draws.getrandbits(24)
