"""The operations as Triton kernels: one launch for all tensors, scalars read from the device, nothing waits.

A kernel gets a table: the sizes of the tensors in the first row, and their addresses in one more row for each
list. A second table tells each program which tensor is its own, and which block of it. Sums are written one a
program and added afterwards in a fixed order: two runs give the same bits.

Triton comes with torch's CUDA and ROCm builds. Tensors are contiguous, on one device, in bfloat16,
float16 or float32.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from gradreg_optim.core.step import Scalar

Tensors = Sequence[Tensor]

BLOCK = 4096
"""Elements a program works on."""
DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


# The kernels. ``table`` and ``places`` are the two tables, ``count`` is the number of tensors.


@triton.jit
def _place(table, places, BLOCK: tl.constexpr, IS_ALIGNED: tl.constexpr):
    """This program's tensor, the first element of its block, and the tensor's size."""
    tensor = tl.load(places + 2 * tl.program_id(0)).to(tl.int64)
    start = tl.load(places + 2 * tl.program_id(0) + 1).to(tl.int64) * BLOCK
    size = tl.load(table + tensor)
    if IS_ALIGNED:
        size = tl.multiple_of(size, 16)
    return tensor, start, size


@triton.jit
def _tensor(table, row, count, tensor, DTYPE: tl.constexpr, IS_ALIGNED: tl.constexpr):
    pointer = tl.load(table + row * count + tensor).to(tl.pointer_type(DTYPE))
    if IS_ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _cut(x, below):
    """Add ``below`` to the bits of a float32 and cut off the lower half, as in bfloat16."""
    cut = ((x.to(tl.uint32, bitcast=True) + below) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where(x == x, cut, x)  # NaN stays NaN


@triton.jit
def _rounded(x, DTYPE: tl.constexpr):
    """float32 as the nearest values of another dtype."""
    if DTYPE == tl.bfloat16:  # noqa: SIM300  casts are not the same everywhere: Triton's interpreter cuts off
        x = _cut(x, 0x7FFF + ((x.to(tl.uint32, bitcast=True) >> 16) & 1))
    return x.to(DTYPE)


@triton.jit(do_not_specialize=["count"])
def _norm_kernel(table, places, count, sums, X: tl.constexpr, BLOCK: tl.constexpr, IS_ALIGNED: tl.constexpr):
    tensor, start, size = _place(table, places, BLOCK, IS_ALIGNED)
    offsets = start + tl.arange(0, BLOCK)
    x = tl.load(_tensor(table, 1, count, tensor, X, IS_ALIGNED) + offsets, offsets < size, other=0.0).to(
        tl.float32
    )
    tl.store(sums + tl.program_id(0), tl.sum(x * x, 0))


@triton.jit(do_not_specialize=["count"])
def _copy_kernel(table, places, count, X: tl.constexpr, BLOCK: tl.constexpr, IS_ALIGNED: tl.constexpr):
    tensor, start, size = _place(table, places, BLOCK, IS_ALIGNED)
    offsets = start + tl.arange(0, BLOCK)
    x = tl.load(_tensor(table, 2, count, tensor, X, IS_ALIGNED) + offsets, offsets < size)
    tl.store(_tensor(table, 1, count, tensor, X, IS_ALIGNED) + offsets, x, offsets < size)


@triton.jit(do_not_specialize=["count", "programs", "seed"])
def _shift_kernel(
    table, places, count, sums, programs, eps, seed,
    W: tl.constexpr, S: tl.constexpr, D: tl.constexpr, SAVES: tl.constexpr, IS_STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr, IS_ALIGNED: tl.constexpr,
):  # fmt: skip
    tensor, first, size = _place(table, places, BLOCK, IS_ALIGNED)
    weights = _tensor(table, 1, count, tensor, W, IS_ALIGNED)
    starts = _tensor(table, 2, count, tensor, S, IS_ALIGNED)
    directions = _tensor(table, 3, count, tensor, D, IS_ALIGNED)
    epsilon = tl.load(eps).to(tl.float32)
    QUARTER: tl.constexpr = BLOCK // 4
    lanes = tl.arange(0, QUARTER)
    along = tl.zeros([QUARTER], tl.float32)
    squares = tl.zeros([QUARTER], tl.float32)
    if IS_STOCHASTIC:  # one draw of the generator makes four numbers: one for each quarter of the block
        bits0, bits1, bits2, bits3 = tl.randint4x(seed + tensor, (first // 4).to(tl.int32) + lanes)
    for quarter in tl.static_range(4):
        offsets = first + quarter * QUARTER + lanes
        inside = offsets < size
        start = tl.load(starts + offsets, inside, other=0.0)
        direction = tl.load(directions + offsets, inside, other=0.0).to(tl.float32)
        moved = start.to(tl.float32) + direction * epsilon
        if IS_STOCHASTIC:  # random bits are added below the cut, and cut off with the rest
            if quarter == 0:
                bits = bits0
            elif quarter == 1:
                bits = bits1
            elif quarter == 2:
                bits = bits2
            else:
                bits = bits3
            moved = _cut(moved, bits.to(tl.uint32, bitcast=True) & 0xFFFF)
        rounded = _rounded(moved, W)
        origin = _rounded(start.to(tl.float32), W)
        if SAVES:
            tl.store(_tensor(table, 4, count, tensor, W, IS_ALIGNED) + offsets, start, inside)
        tl.store(weights + offsets, rounded, inside)
        along += (rounded.to(tl.float32) - origin.to(tl.float32)) * direction
        squares += direction * direction
    tl.store(sums + tl.program_id(0), tl.sum(along, 0))
    tl.store(sums + programs + tl.program_id(0), tl.sum(squares, 0))


@triton.jit(do_not_specialize=["count", "programs"])
def _moments_kernel(
    table, places, count, sums, programs, scale,
    F: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr, IS_ALIGNED: tl.constexpr,
):  # fmt: skip
    tensor, start, size = _place(table, places, BLOCK, IS_ALIGNED)
    offsets = start + tl.arange(0, BLOCK)
    inside = offsets < size
    firsts = _tensor(table, 1, count, tensor, F, IS_ALIGNED) + offsets
    factor = tl.load(scale).to(tl.float32)
    first = _rounded(tl.load(firsts, inside, other=0.0).to(tl.float32) * factor, F)
    if factor != 1.0:
        tl.store(firsts, first, inside)
    second = tl.load(_tensor(table, 2, count, tensor, S, IS_ALIGNED) + offsets, inside, other=0.0).to(
        tl.float32
    )
    delta = second - first.to(tl.float32)
    tl.store(sums + tl.program_id(0), tl.sum(delta * first.to(tl.float32), 0))
    tl.store(sums + programs + tl.program_id(0), tl.sum(delta * delta, 0))


@triton.jit(do_not_specialize=["count"])
def _combine_kernel(
    table, places, count, weight, clip, is_finite,
    F: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr, IS_ALIGNED: tl.constexpr,
):  # fmt: skip
    tensor, start, size = _place(table, places, BLOCK, IS_ALIGNED)
    offsets = start + tl.arange(0, BLOCK)
    inside = offsets < size
    first = tl.load(_tensor(table, 1, count, tensor, F, IS_ALIGNED) + offsets, inside, other=0.0).to(
        tl.float32
    )
    seconds = _tensor(table, 2, count, tensor, S, IS_ALIGNED) + offsets
    second = tl.load(seconds, inside, other=0.0).to(tl.float32) * tl.load(clip).to(tl.float32)
    share = tl.load(weight).to(tl.float32)
    # The nearer of the two is where to begin: exactly the second one for weight 1, the first one for 0.
    combined = tl.where(
        tl.abs(share) > 0.5, second + (1.0 - share) * (first - second), first + share * (second - first)
    )
    combined = tl.where(tl.load(is_finite).to(tl.float32) != 0.0, combined, first)
    tl.store(seconds, _rounded(combined, S), inside)


# The tables.


def fit(tensors: Tensors) -> bool:
    """Whether the kernels take these tensors: what they are, not where."""
    return (
        {*map(type, tensors)} <= {Tensor, nn.Parameter}  # others may keep their elements elsewhere
        and {x.dtype for x in tensors} <= DTYPES.keys()
        and all(map(Tensor.is_contiguous, tensors))
    )


@lru_cache(maxsize=64)
def _places(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, int]:
    """The tensor and block of each program, int32 [programs, 2] on the device; and the number of programs."""
    blocks = torch.tensor([-(-size // BLOCK) for size in sizes])
    tensors = torch.arange(len(sizes)).repeat_interleave(blocks)
    firsts = blocks.cumsum(0) - blocks
    places = torch.stack([tensors, torch.arange(len(tensors)) - firsts[tensors]], 1)
    return _sent(places.int(), device), len(places)


@lru_cache(maxsize=64)
def _table(sizes: tuple[int, ...], addresses: tuple[int, ...], device: torch.device) -> Tensor:
    return _sent(torch.tensor([*sizes, *addresses], dtype=torch.int64), device)


@lru_cache(maxsize=64)
def _number(value: float, device: torch.device) -> Tensor:
    return torch.full((), value, device=device)


def _sent(values: Tensor, device: torch.device) -> Tensor:
    """``values`` on the device. Memory that is pinned can be read by the device while the host goes on."""
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)


class _Launch:
    """One launch over all tensors of some lists that are laid out alike."""

    def __init__(self, *lists: Tensors) -> None:
        sizes = tuple([x.numel() for x in lists[0]])
        addresses = tuple([x.data_ptr() for tensors in lists for x in tensors])
        self._device = lists[0][0].device
        self._places, self.programs = _places(sizes, self._device)
        is_aligned = all(number % 16 == 0 for number in sizes + addresses)
        self._constants = {"BLOCK": BLOCK, "IS_ALIGNED": is_aligned}
        self._first = (_table(sizes, addresses, self._device), self._places, len(sizes))

    def sums(self, rows: int) -> Tensor:
        """Room for a number a row and program."""
        return torch.empty(rows, self.programs, device=self._device)

    def scalar(self, value: Scalar) -> Tensor:
        """Where the kernel reads the value."""
        return value if isinstance(value, Tensor) else _number(float(value), self._device)

    def __call__(self, kernel: Any, *arguments: object, **constants: object) -> None:
        if self.programs:
            # Triton launches on the current device.
            with nullcontext() if self._device.type == "cpu" else torch.cuda.device(self._device):
                kernel[(self.programs,)](*self._first, *arguments, **constants, **self._constants)


def _dtypes(names: str, *lists: Tensors) -> dict[str, object]:
    return {name: DTYPES[tensors[0].dtype] for name, tensors in zip(names, lists, strict=True)}


# The operations.


def norm_squared(tensors: Tensors) -> Tensor:
    """Σ‖x‖²."""
    launch = _Launch(tensors)
    launch(_norm_kernel, sums := launch.sums(1), **_dtypes("X", tensors))
    return sums.sum()


def moments_(g1: Tensors, g2: Tensors, *, scale: Scalar = 1.0) -> tuple[Tensor, ...]:
    """``g1 ← scale·g1``, then ⟨g2 − g1, g1⟩ and ‖g2 − g1‖²."""
    launch = _Launch(g1, g2)
    launch(
        _moments_kernel,
        sums := launch.sums(2),
        launch.programs,
        launch.scalar(scale),
        **_dtypes("FS", g1, g2),
    )
    return sums.sum(1).unbind()


def copy_(tensors: Tensors, others: Tensors) -> None:
    """``x ← y`` for lists of the same dtype."""
    _Launch(tensors, others)(_copy_kernel, **_dtypes("X", tensors))


def shift_(
    weights: Tensors,
    direction: Tensors,
    start: Tensors | None = None,
    *,
    eps: Scalar,
    saved: Tensors | None = None,
    seed: int | None = None,
) -> tuple[Tensor, ...]:
    """``weights ← start + ε·d`` (default: from where they are), and ⟨what arrived, d⟩ and ‖d‖².

    With a ``seed``, bfloat16 is rounded stochastically. ``saved`` gets copies of ``start``.
    """
    start = weights if start is None else start
    launch = _Launch(weights, start, direction, *([] if saved is None else [saved]))
    sums = launch.sums(2).fill_(-1)
    try:
        launch(
            _shift_kernel, sums, launch.programs, launch.scalar(eps), seed or 0,
            **_dtypes("WSD", weights, start, direction),
            SAVES=saved is not None, IS_STOCHASTIC=seed is not None and weights[0].dtype == torch.bfloat16,
        )  # fmt: skip
    except BaseException:
        # These are squares: the kernel has run, and an interrupt came after it.
        if saved is not None and bool((sums[1] != -1).all()):
            copy_(weights, saved)
        raise
    return sums.sum(1).unbind()


def combine_(
    g1: Tensors,
    g2: Tensors,
    *,
    weight: Scalar,
    clip: Scalar = 1.0,
    is_finite: Scalar = True,
) -> None:
    """``g2 ← g1 + weight·(clip·g2 − g1)``, or g1 if not ``is_finite``."""
    launch = _Launch(g1, g2)
    launch(_combine_kernel, *map(launch.scalar, (weight, clip, is_finite)), **_dtypes("FS", g1, g2))
