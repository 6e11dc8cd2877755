"""Passes over memory: the operations on lists of tensors of which a step consists.

    norm_squared          ‖g‖²
    save_and_shift_       θ ← θ + ε·d, and copies of θ
    restore_              θ, from the copies
    moments_              ⟨g2 − g1, g1⟩ and ‖g2 − g1‖²
    combine_              g2 ← g1 + weight·(clip·g2 − g1)

They take any device and dtype, several in one list too. On a GPU :mod:`triton_kernels` does each of these in
one launch. What is here uses torch._foreach_*, and flat chunks for what that cannot do: small tensors share a
chunk and large ones are cut, so that the number of launches does not grow with the number of tensors. Sums
run in float32 for half-precision tensors and in the tensors' own precision otherwise; results are 0-d tensors
on the device of the data, which nothing here waits for, and the number 0 for empty lists.
"""

import functools
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gradreg_optim.core.multi_tensor import back_end
from gradreg_optim.core.step import Scalar

Tensors = Sequence[Tensor]
Moments = tuple[Scalar, Scalar]

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's interpreter runs the kernels on a CPU, for tests."""
CHUNK = 2**27
"""Elements a chunk on an accelerator. Larger chunks need fewer launches, and more memory for temporaries."""
CHUNK_ON_CPU = 2**17
"""Elements a chunk on a CPU: intermediate results stay in its cache."""
SIGNED = 2**24
"""Elements that get random signs at a time."""


def _kernels_for(tensors: Tensors) -> Any:
    """The Triton back end, if these tensors are on one device that it works on; else ``None``."""
    device = tensors[0].device
    is_served = device.type == "cuda" or (device.type == "cpu" and IS_INTERPRETED)
    return back_end.kernels() if is_served and all(x.device == device for x in tensors) else None


def _alike(*lists: Tensors) -> list[tuple[Any, Sequence[Tensors]]]:
    """The lists, divided by dtype and device; with each part the kernels, if they take it, else ``None``."""
    if lists[0] and all(len({(x.dtype, x.device) for x in xs}) == 1 for xs in lists):
        kernels = _kernels_for([xs[0] for xs in lists])
        if kernels is None or all(map(kernels.fit, lists)):
            return [(kernels, lists)]
    found: dict[Any, list[list[Tensor]]] = {}
    for tensors in zip(*lists, strict=True):
        kernels = _kernels_for(tensors)
        kernels = kernels if kernels is not None and kernels.fit(tensors) else None
        parts = found.setdefault((kernels, *((x.dtype, x.device) for x in tensors)), [[] for _ in lists])
        for part, tensor in zip(parts, tensors, strict=True):
            part.append(tensor)
    return [(key[0], parts) for key, parts in found.items()]


def _on_alike(kernel: str, *, sums: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Run an operation on tensors that are alike at a time, by the ``kernel`` of this name if there is one.

    It returns as many ``sums``, which are added up; nothing is known if one of them is ``None``.
    """

    def of_any(operation: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(operation)
        def on_each(*lists: Tensors, **settings: Any) -> Any:
            parts = _alike(*lists)
            found = [getattr(kernels, kernel, operation)(*alike, **settings) for kernels, alike in parts]
            return _total(found, sums)

        return on_each

    return of_any


def _total(found: list[Any], sums: int) -> Any:
    """The sums of some parts' results; ``None`` if one is not known."""
    if any(result is None for result in found):
        return None
    return _added(found) if sums == 1 else tuple(_added([part[i] for part in found]) for i in range(sums))


def _added(sums: list[Tensor]) -> Scalar:
    """The sum, in the widest dtype and on the device of the first; the number 0 for an empty list."""
    if len(sums) < 2:
        return sums[0] if sums else 0.0
    wide = max((x.dtype for x in sums), key=lambda dtype: dtype.itemsize)
    return torch.stack([x.to(sums[0].device, wide) for x in sums]).sum()


def chunks(*lists: Tensors) -> Iterator[tuple[list[Tensor], ...]]:
    """Views of the same elements of each list, a chunk at a time; non-contiguous tensors stay whole.

    >>> parts = list(chunks([torch.zeros(2), torch.zeros(10**6)], [torch.ones(2), torch.ones(10**6)]))
    >>> [x.numel() for x in parts[0][1]], sum(x.numel() for _, views in parts for x in views)
    ([2], 1000002)
    """
    size = CHUNK_ON_CPU if lists[0][0].device.type == "cpu" else CHUNK
    pending: list[Tensors] = []
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


def _cut(tensors: Tensors, size: int) -> Iterable[Tensors]:
    """Flat views of ``size`` elements of tensors of one shape; the tensors if one is not contiguous."""
    if not all(x.is_contiguous() for x in tensors):
        return [tensors]
    return zip(*(torch.split(x.view(-1), size) for x in tensors), strict=True)


def _flat(views: Tensors, dtype: torch.dtype) -> Tensor:
    """``views`` as one flat tensor that must not be written: it may be a view."""
    return (views[0].reshape(-1) if len(views) == 1 else torch.cat([x.reshape(-1) for x in views])).to(dtype)


def _write_(views: Tensors, flat: Tensor) -> None:
    parts = torch.split(flat, [x.numel() for x in views])
    torch._foreach_copy_(list(views), [part.view(x.shape) for part, x in zip(parts, views, strict=True)])


def sampled(tensor: Tensor, *, limit: int = 2**12, block: int = 64) -> Tensor:
    """A view of about ``limit`` elements, in blocks spread evenly over ``tensor``; all of a smaller tensor.

    >>> sampled(torch.arange(100), limit=6, block=2)
    tensor([[ 0,  1],
            [33, 34],
            [66, 67]])
    """
    flat = tensor.flatten()
    if flat.numel() <= limit:
        return flat
    return flat.unfold(0, block, flat.numel() // (limit // block))[: limit // block]


def with_signs(direction: Tensors, *others: Tensors, seed: int) -> Iterator[tuple[list[Tensor], int]]:
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


class StochasticRounding:
    """Rounds float32 values to values of bfloat16, up or down so that they are right on average.

    bfloat16 is the upper half of float32: random bits are added below the cut, and cut off with the rest.
    Those of a chunk are the bits of the first, some of them flipped in all of its elements alike. Any two are
    independent, so that errors add up as if all bits had been drawn anew, which would take most of the time
    of a step on a CPU.
    """

    def __init__(self, seed: int) -> None:
        self._seed, self._keys = seed, random.Random(seed)
        self._first = torch.empty(0)

    def round_(self, values: Tensor) -> Tensor:
        """Round contiguous float32 ``values`` in place."""
        if len(self._first) < values.numel():
            generator = torch.Generator(values.device).manual_seed(self._seed)
            self._first = torch.empty(values.numel(), dtype=torch.int32, device=values.device)
            self._first.random_(0, 2**16, generator=generator)
        noise = self._first[: values.numel()].bitwise_xor(self._keys.getrandbits(16))
        values.view(-1).view(torch.int32).add_(noise).bitwise_and_(-(2**16))
        return values


@_on_alike("norm_squared", sums=1)
def norm_squared(tensors: Tensors) -> Tensor:
    """Σ‖x‖² over all ``tensors`` as one 0-d tensor.

    >>> norm_squared([torch.tensor([3.0]), torch.tensor([[4.0]])])
    tensor(25.)
    """
    norms = torch._foreach_norm(list(tensors), 2, dtype=torch.promote_types(tensors[0].dtype, torch.float32))
    return torch.stack(list(norms)).square().sum()


@_on_alike("moments_", sums=2)
def moments_(g1: Tensors, g2: Tensors, *, scale: Scalar = 1.0) -> Moments:
    """``g1 ← scale·g1`` in place, then ⟨g2 − g1, g1⟩ and ‖g2 − g1‖², summed over the lists.

    The difference is taken element by element before anything is summed: inner products of the two gradients
    would cancel to noise when θ' is close to θ.

    >>> moments_([torch.tensor([1.0])], [torch.tensor([3.0])])
    (tensor(2.), tensor(4.))
    """
    scale_(g1, scale)
    wide, found = torch.promote_types(g1[0].dtype, torch.float32), list[Tensor]()
    for firsts, seconds in chunks(g1, g2):
        first = _flat(firsts, wide)
        delta = _flat(seconds, wide) - first
        found += [torch.dot(delta, first), torch.dot(delta, delta)]
    return torch.stack(found[::2]).sum(), torch.stack(found[1::2]).sum()


@_on_alike("", sums=2)
def step_moments(start: Tensors, end: Tensors, direction: Tensors) -> Moments:
    """⟨end − start, d⟩ and ‖d‖²: how much of a step along ``direction`` survived the weights' dtype.

    ``start`` counts as rounded to the dtype of ``end``. A sample of a large tensor is enough
    (:func:`sampled`), and saves a pass over memory.
    """
    lists, home = (start, end, direction), start[0].device
    origin, there, along = (torch.cat([sampled(x).reshape(-1) for x in xs]).to(home) for xs in lists)
    wide = torch.promote_types(there.dtype, torch.float32)
    arrived, along = there.to(wide) - origin.to(there.dtype).to(wide), along.to(wide)
    return torch.dot(arrived, along), torch.dot(along, along)


@_on_alike("", sums=1)
def inner(xs: Tensors, ys: Tensors, start: Tensors | None = None) -> Tensor:
    """⟨x, y⟩ or, with a ``start``, ⟨x − start, y − start⟩; the differences live a chunk at a time.

    >>> inner([torch.tensor([3.0])], [torch.tensor([6.0])], [torch.tensor([1.0])])
    tensor(10.)
    """
    wide, products = torch.promote_types(xs[0].dtype, torch.float32), list[Tensor]()
    for views in chunks(xs, ys, *([] if start is None else [start])):
        x, y, *origin = (_flat(part, wide) for part in views)
        products.append(torch.dot(x - origin[0], y - origin[0]) if origin else torch.dot(x, y))
    return torch.stack(products).sum()


def of_group(seed: int | None, number: int) -> int | None:
    """The seed of a parameter group, given that of a step; ``None`` stays ``None``."""
    return None if seed is None else (seed << 40) + (number << 24)


def save_and_shift_(
    weights: Tensors, direction: Tensors, *, eps: Scalar, seed: int | None = None, signs: int | None = None
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
    saved = [torch.empty_like(weight) for weight in weights]
    moved, arrived = list[tuple[Tensors, Tensors]](), list[Any]()
    parts = _alike(weights, saved, direction) if signs is None else [(None, (weights, saved, direction))]
    try:
        for number, (kernels, (theta, copies, along)) in enumerate(parts):
            own = None if seed is None else seed + (number << 18)
            if kernels is None:
                _copy_(copies, theta)
                moved.append((theta, copies))
                arrived.append(shift_(theta, along, eps=eps, seed=own, signs=signs))
            else:  # which restores θ by itself
                arrived.append(kernels.shift_(theta, along, saved=copies, eps=eps, seed=own))
                moved.append((theta, copies))
        return saved, _total(arrived, 2)
    except BaseException:
        for theta, copies in moved:
            restore_(theta, copies)
        raise


def shift_(
    weights: Tensors,
    direction: Tensors,
    *,
    eps: Scalar,
    start: Tensors | None = None,
    seed: int | None = None,
    signs: int | None = None,
) -> Any:
    """``θ ← start + ε·d``, where ``start`` may be masters in another dtype or on another device.

    Seeds and result as in :func:`save_and_shift_`; with ``signs`` nothing is measured.
    """
    if signs is None:
        return _shift_(weights, direction, *(() if start is None else (start,)), eps=eps, seed=seed)
    origins = weights if start is None else start
    for (along, moved, origin), key in with_signs(direction, weights, origins, seed=signs):
        shift_([moved], [along], eps=eps, start=[origin], seed=None if seed is None else seed + key)
    return None


@_on_alike("shift_", sums=2)
def _shift_(
    weights: Tensors, direction: Tensors, start: Tensors | None = None, *, eps: Scalar, seed: int | None
) -> Any:
    """On an accelerator also :func:`step_moments`, of chunks: sampling each tensor takes a launch each."""
    is_on_cpu = weights[0].device.type == "cpu"
    rounding = None if seed is None or weights[0].dtype != torch.bfloat16 else StochasticRounding(seed)
    if start is None and rounding is None and is_on_cpu and not isinstance(eps, Tensor):
        torch._foreach_add_(list(weights), list(direction), alpha=eps)
        return None
    start = weights if start is None else start
    wide, samples = torch.promote_types(start[0].dtype, torch.float32), list[tuple[Tensor, ...]]()
    for written, origins, steps in chunks(weights, start, direction):
        origin, along = _flat(origins, wide), _flat(steps, wide).to(origins[0].device)
        if isinstance(eps, Tensor):
            moved = origin.addcmul(along, eps.to(wide))
        else:
            moved = origin.add(along, alpha=eps)
        if rounding is not None:
            rounding.round_(moved)
        if not is_on_cpu:
            arrived = sampled(moved).to(written[0].dtype)
            samples.append((sampled(origin).clone(), arrived, sampled(along).clone()))
        _write_(written, moved)
    return step_moments(*zip(*samples, strict=True)) if samples else None


def restore_(weights: Tensors, saved: Tensors) -> None:
    """θ again, bit for bit, also if an interrupt hits the copy."""
    try:
        _copy_(weights, saved)
    except BaseException:
        _copy_(weights, saved)
        raise


@_on_alike("copy_", sums=0)
def _copy_(tensors: Tensors, others: Tensors) -> None:
    torch._foreach_copy_(list(tensors), list(others))


def scale_(tensors: Tensors, factor: Scalar) -> None:
    """``x ← factor·x`` in place; free when the factor is known to be 1."""
    # torch._foreach_* refuses empty lists, which a group without gradients has.
    if tensors and not (isinstance(factor, float) and factor == 1.0):
        torch._foreach_mul_(list(tensors), factor)


def add_(tensors: Tensors, others: Tensors, *, factor: float = 1.0) -> None:
    """``x ← x + factor·y`` in place."""
    if tensors:
        torch._foreach_add_(list(tensors), list(others), alpha=factor)


@_on_alike("combine_", sums=0)
def combine_(
    g1: Tensors, g2: Tensors, *, weight: Scalar, clip: Scalar = 1.0, is_finite: Scalar = True
) -> None:
    """``g2 ← g1 + weight·(clip·g2 − g1)`` in place, or g1 where ``is_finite`` (perhaps a tensor) is false.

    Written as g2 + (1 − weight)·(g1 − g2) near weight 1 (γ = ε, sharpness-aware minimization), which leaves
    exactly g2; weight 0 leaves exactly g1.

    >>> g = torch.tensor([3.0]); combine_([torch.tensor([1.0])], [g], weight=10.0); g
    tensor([21.])
    """
    if not any(isinstance(scalar, Tensor) for scalar in (weight, clip, is_finite)):
        scale_(g2, clip)
        torch._foreach_lerp_(list(g2), list(g1), 1.0 - weight)  # type: ignore[arg-type]
        return
    wide = torch.promote_types(g2[0].dtype, torch.float32)
    share = 1.0 - (weight.to(wide) if isinstance(weight, Tensor) else weight)
    for firsts, seconds in chunks(g1, g2):
        first = _flat(firsts, wide)
        combined = _flat(seconds, wide).mul(clip).lerp_(first, share)
        if isinstance(is_finite, Tensor):
            torch.where(is_finite, combined, first, out=combined)
        _write_(seconds, combined)


@_on_alike("", sums=0)
def choose_(tensors: Tensors, others: Tensors, *, condition: Tensor) -> None:
    """``x ← x if condition else y`` in place, for a condition that nobody has read."""
    for xs, ys in chunks(tensors, others):
        _write_(xs, torch.where(condition, _flat(xs, xs[0].dtype), _flat(ys, xs[0].dtype)))
