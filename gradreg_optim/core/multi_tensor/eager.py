"""The operations in torch alone, on any device and dtype.

They use torch._foreach_*, and flat chunks for what that cannot do.

Tensors of one list are alike: of one dtype, on one device. Small tensors share a chunk and large ones are
cut, so that the number of kernel launches does not grow with the number of tensors.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

Scalar = float | Tensor

CHUNK = 2**27
"""Elements a chunk on an accelerator. Larger chunks need fewer launches, and more memory for temporaries."""
CHUNK_ON_CPU = 2**17
"""Elements a chunk on a CPU: intermediate results stay in its cache."""
SIGNED = 2**24
"""Elements that get random signs at a time."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums over tensors of ``dtype`` run in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def chunks(*lists: Sequence[Tensor]) -> Iterator[tuple[list[Tensor], ...]]:
    """Views of the same elements of each list, a chunk at a time; non-contiguous tensors stay whole.

    >>> parts = list(chunks([torch.zeros(2), torch.zeros(10**6)], [torch.ones(2), torch.ones(10**6)]))
    >>> [x.numel() for x in parts[0][1]], sum(x.numel() for _, views in parts for x in views)
    ([2], 1000002)
    """
    size = CHUNK_ON_CPU if lists[0][0].device.type == "cpu" else CHUNK
    pending: list[Sequence[Tensor]] = []
    count = 0
    for tensors in zip(*lists, strict=True):
        for views in _cut(tensors, size) if tensors[0].numel() > size else [tensors]:
            if pending and count + views[0].numel() > size:
                yield tuple(map(list, zip(*pending, strict=True)))
                pending, count = [], 0
            pending.append(views)
            count += views[0].numel()
    if pending:
        yield tuple(map(list, zip(*pending, strict=True)))


def _cut(tensors: Sequence[Tensor], size: int) -> Iterable[Sequence[Tensor]]:
    """Flat views of ``size`` elements of tensors of one shape; the tensors if one is not contiguous."""
    if not all(x.is_contiguous() for x in tensors):
        return [tensors]
    return zip(*(torch.split(x.view(-1), size) for x in tensors), strict=True)


def with_signs(
    direction: Sequence[Tensor], *others: Sequence[Tensor], seed: int
) -> Iterator[tuple[list[Tensor], int]]:
    """A direction of the same length that leads elsewhere, in pieces of the lists.

    The elements of a tensor of ``direction`` are turned about, as in :func:`torch.roll`, and take random
    signs. In their own places they would still lead where the loss is curved most. Both depend on the seed,
    the tensor's place in the list and its shape: ranks whose other tensors differ draw the same for the one
    that they share. With each piece comes a seed.

    >>> [(pieces, _)] = with_signs([torch.ones(6)], [torch.zeros(6)], seed=0); pieces[0].abs(), pieces[1]
    (tensor([1., 1., 1., 1., 1., 1.]), tensor([0., 0., 0., 0., 0., 0.]))
    """
    for place, tensors in enumerate(zip(direction, *others, strict=True)):
        draws = random.Random(seed + place)  # torch's generator on a CPU takes 32 bits of a seed alone
        flat, begin = tensors[0].reshape(-1), draws.randrange(tensors[0].numel() or 1)
        for along, *rest in _cut(tensors, SIGNED):
            generator = torch.Generator(along.device).manual_seed(draws.getrandbits(32))
            signs = torch.empty_like(along).bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
            end = begin + along.numel()
            turned = torch.cat([flat[begin:end], flat[: max(0, end - flat.numel())]])
            begin = end % (flat.numel() or 1)
            yield [signs.mul_(turned.view_as(along)), *rest], draws.getrandbits(24)


class Room:
    """Memory for flat copies that is used again for each chunk: on a CPU it is in the cache then."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def flat(self, like: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Room for as many elements as ``like`` has, on its device."""
        count = sum(x.numel() for x in like)
        if self._memory is None or self._memory.numel() < count:
            self._memory = torch.empty(count, dtype=dtype, device=like[0].device)
        return self._memory[:count]

    def copy_of(self, views: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """A flat copy of ``views``."""
        if views[0].device.type != "cpu":
            # In one launch; the allocator keeps the memory.
            return torch.cat([x.flatten() for x in views]).to(dtype)
        flat = self.flat(views, dtype)
        torch._foreach_copy_(_shaped(flat, views), list(views))
        return flat

    def read(self, views: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """``views`` as one flat tensor that must not be written: itself, if it is one already."""
        if len(views) == 1 and views[0].dtype == dtype and views[0].is_contiguous():
            return views[0].view(-1)
        return self.copy_of(views, dtype)


def _shaped(flat: Tensor, views: Sequence[Tensor]) -> list[Tensor]:
    """The parts of ``flat`` that belong to ``views``, in their shapes."""
    if len(views) == 1:
        return [flat.view(views[0].shape)]
    parts = torch.split(flat, [x.numel() for x in views])
    return [part.view(x.shape) for part, x in zip(parts, views, strict=True)]


# Sums.


def norm_squared(tensors: Sequence[Tensor]) -> Tensor:
    """Σ‖x‖²."""
    norms = torch._foreach_norm(list(tensors), 2, dtype=accumulation_dtype(tensors[0].dtype))
    return torch.stack(list(norms)).square().sum()


def moments_(g1: Sequence[Tensor], g2: Sequence[Tensor], *, scale: Scalar) -> tuple[Tensor, Tensor]:
    """``g1 ← scale·g1``, then ⟨g2 − g1, g1⟩ and ‖g2 − g1‖²."""
    scale_(g1, scale)
    wide, rooms, found = accumulation_dtype(g1[0].dtype), [Room() for _ in range(3)], []
    for firsts, seconds in chunks(g1, g2):
        first, second = rooms[0].read(firsts, wide), rooms[1].read(seconds, wide)
        delta = torch.sub(second, first, out=rooms[2].flat(firsts, wide))
        found += [torch.dot(delta, first), torch.dot(delta, delta)]
    return torch.stack(found[::2]).sum(), torch.stack(found[1::2]).sum()


def inner(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """⟨x, y⟩."""
    wide, rooms = accumulation_dtype(xs[0].dtype), (Room(), Room())
    return torch.stack(
        [torch.dot(rooms[0].read(a, wide), rooms[1].read(b, wide)) for a, b in chunks(xs, ys)]
    ).sum()


def inner_of_differences(start: Sequence[Tensor], left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """⟨left − start, right − start⟩; the differences live a chunk at a time."""
    wide, rooms, found = accumulation_dtype(start[0].dtype), [Room() for _ in range(3)], []
    for origins, lefts, rights in chunks(start, left, right):
        origin = rooms[0].read(origins, wide)
        found.append(
            torch.dot(rooms[1].copy_of(lefts, wide).sub_(origin), rooms[2].copy_of(rights, wide).sub_(origin))
        )
    return torch.stack(found).sum()


def sampled(tensor: Tensor, *, limit: int = 2**12, block: int = 64) -> Tensor:
    """A view of about ``limit`` elements, in blocks spread evenly over ``tensor``; all of a smaller tensor.

    >>> sampled(torch.arange(100), limit=6, block=2)
    tensor([[ 0,  1],
            [33, 34],
            [66, 67]])
    """
    flat = tensor.flatten()
    return (
        flat
        if flat.numel() <= limit
        else flat.unfold(0, block, flat.numel() // (limit // block))[: limit // block]
    )


def step_moments(
    start: Sequence[Tensor], end: Sequence[Tensor], direction: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """⟨end − start, d⟩ and ‖d‖² on samples, on the device of ``start``, rounded to the dtype of ``end``."""
    home, wide = start[0].device, accumulation_dtype(end[0].dtype)
    lists = (start, end, direction)
    origin, there, along = (torch.cat([sampled(x).reshape(-1) for x in xs]).to(home) for xs in lists)
    arrived, along = there.to(wide) - origin.to(there.dtype).to(wide), along.to(wide)
    return torch.dot(arrived, along), torch.dot(along, along)


# In place.


def copy_(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """``x ← y``."""
    torch._foreach_copy_(list(tensors), list(others))


def scale_(tensors: Sequence[Tensor], factor: Scalar) -> None:
    """``x ← factor·x``; free when the factor is known to be 1."""
    if not (isinstance(factor, float) and factor == 1.0):
        torch._foreach_mul_(list(tensors), factor)


def choose_(condition: Tensor, tensors: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """``x ← x if condition else y``."""
    rooms = Room(), Room()
    for xs, ys in chunks(tensors, others):
        x = rooms[0].copy_of(xs, xs[0].dtype)
        copy_(xs, _shaped(torch.where(condition, x, rooms[1].read(ys, x.dtype), out=x), xs))


def save_and_shift_(
    weights: Sequence[Tensor],
    saved: Sequence[Tensor],
    direction: Sequence[Tensor],
    *,
    eps: Scalar,
    seed: int | None,
) -> tuple[Tensor, Tensor] | None:
    """Copy θ to ``saved``, then :func:`shift_`."""
    copy_(saved, weights)
    try:
        return shift_(weights, direction, eps=eps, seed=seed)
    except BaseException:
        copy_(weights, saved)
        raise


def shift_(
    weights: Sequence[Tensor],
    direction: Sequence[Tensor],
    start: Sequence[Tensor] | None = None,
    *,
    eps: Scalar,
    seed: int | None = None,
) -> tuple[Tensor, Tensor] | None:
    """``weights ← start + ε·d`` (default: from ``weights``); a ``seed`` rounds bfloat16 stochastically.

    On an accelerator also :func:`step_moments`, of each chunk: to take samples of each tensor
    is a launch a tensor.
    """
    is_on_cpu = weights[0].device.type == "cpu"
    rounding = None if seed is None or weights[0].dtype != torch.bfloat16 else StochasticRounding(seed)
    if start is None and rounding is None and is_on_cpu and not isinstance(eps, Tensor):
        torch._foreach_add_(list(weights), list(direction), alpha=eps)
        return None
    start = weights if start is None else start
    wide, rooms = accumulation_dtype(start[0].dtype), (Room(), Room())
    samples: list[tuple[Tensor, ...]] = []
    for written, origins, steps in chunks(weights, start, direction):
        moved, along = rooms[0].copy_of(origins, wide), rooms[1].read(steps, wide).to(origins[0].device)
        origin = None if is_on_cpu else sampled(moved).clone()
        if isinstance(eps, Tensor):
            moved.addcmul_(along, eps.to(wide))
        else:
            moved.add_(along, alpha=eps)
        if rounding is not None:
            rounding.round_(moved)
        if origin is not None:
            samples.append((origin, sampled(moved).to(written[0].dtype), sampled(along).clone()))
        copy_(written, _shaped(moved, written))
    if not samples:
        return None
    origins, ends, steps = map(list, zip(*samples, strict=True))
    return step_moments(origins, ends, steps)


class StochasticRounding:
    """Rounds float32 values to values of bfloat16, up or down so that they are right on average.

    bfloat16 is the upper half of float32: random bits are added below the cut, and cut off with the rest.
    Those of a chunk are the bits of the first, some of them flipped in all of its elements alike. Any two are
    independent, so that errors add up as if all bits had been drawn anew, which would take most of the time
    of a step on a CPU.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._keys = random.Random(seed)
        self._first: Tensor | None = None
        self._room = Room()

    def round_(self, values: Tensor) -> Tensor:
        """Round contiguous float32 ``values`` in place."""
        if self._first is None or len(self._first) < values.numel():
            generator = torch.Generator(values.device).manual_seed(self._seed)
            self._first = torch.empty(values.numel(), dtype=torch.int32, device=values.device)
            self._first.random_(0, 2**16, generator=generator)
        noise = self._room.flat([values], torch.int32)
        torch.bitwise_xor(self._first[: values.numel()], self._keys.getrandbits(16), out=noise)
        values.view(-1).view(torch.int32).add_(noise).bitwise_and_(-(2**16))
        return values


# Gradients in place.


def combine_(
    g1: Sequence[Tensor], g2: Sequence[Tensor], *, weight: Scalar, clip: Scalar, is_finite: Scalar
) -> None:
    """``g2 ← g1 + weight·(clip·g2 − g1)``, or g1 if not ``is_finite``."""
    if not isinstance(weight, Tensor) and not isinstance(clip, Tensor) and not isinstance(is_finite, Tensor):
        scale_(g2, clip)
        torch._foreach_lerp_(list(g2), list(g1), 1.0 - weight)
        return
    wide, rooms = accumulation_dtype(g2[0].dtype), (Room(), Room())
    for firsts, seconds in chunks(g1, g2):
        first, combined = rooms[0].read(firsts, wide), rooms[1].copy_of(seconds, wide).mul_(clip)
        combined.lerp_(first, 1.0 - weight.to(wide) if isinstance(weight, Tensor) else 1.0 - weight)
        if isinstance(is_finite, Tensor):
            torch.where(is_finite, combined, first, out=combined)
        copy_(seconds, _shaped(combined, seconds))
