"""Values of tensors that are not ours: copied, compared, and written back, wherever and of whatever kind they are."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gradreg_optim.core.local import local_shard

NOTHING: Any = object()  # in place of an attribute that did not exist, and
_ACTIVATION: Any = object()  # of one that holds the result of an operation, which is not kept alive
_LARGE = 2**26
"""Bytes from which on a copy that may not be needed is made on the host."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Held:
    """One tensor in one step, and its values before the first pass and after it, where there are copies.

    ``moves`` is ``None`` until that is known.
    """

    tensor: Tensor
    version: int
    moves: bool | None
    before: Tensor | None = None
    after: Tensor | None = None


@dataclass
class Known:
    """Which names of a module refer to tensors that move, and copies of small ones that do not.

    ``silent`` are those of which ``_version`` changes and the value does not: DistributedDataParallel broadcasts them.
    """

    is_new: bool = True
    moving: set[str] = field(default_factory=set)
    silent: set[str] = field(default_factory=set)
    kept: dict[str, Held] = field(default_factory=dict)


def is_wrapped(value: Any) -> bool:
    """Whether a transform of ``torch.func`` put ``value`` in place of another tensor."""
    return isinstance(value, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value)


def writable(value: Any) -> Tensor | None:
    """The plain tensor on this process that holds the numbers of ``value``; ``None`` if there is no such tensor."""
    if not isinstance(value, Tensor):
        return None
    while is_wrapped(value):
        value = torch._C._functorch.get_unwrapped(value)
    tensor = local_shard(value)
    is_plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_quantized
    if not is_plain or tensor.device.type == "meta" or tensor.is_inference():
        return None
    return None if is_expanded(tensor) else tensor


def is_expanded(tensor: Tensor) -> bool:
    """Whether elements share memory, so that nothing writes them in place."""
    is_strided = tensor.layout is torch.strided
    return is_strided and any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True))


def copied(tensor: Tensor, *, is_sure: bool) -> Tensor:
    """A copy; on the host if it is large and not sure to be needed."""
    if not is_sure and tensor.device.type != "cpu" and tensor.nbytes >= _LARGE:
        return tensor.cpu()
    return tensor.clone()


def differ(tensor: Tensor, before: Tensor) -> bool:
    """Whether any bit differs: NaN is equal to itself. Waits for the device."""
    if tensor.shape != before.shape or tensor.dtype != before.dtype:
        return True
    now, then = (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in (tensor.to(before.device), before))
    integer = _INTEGERS[now.element_size()]
    return bool((now.view(integer) != then.view(integer)).any())


def write_(tensor: Tensor, value: Tensor) -> None:
    """Write ``value`` into ``tensor``, which an observer may have resized."""
    if tensor.shape == value.shape and tensor.dtype == value.dtype:
        tensor.copy_(value)
    else:
        tensor.data = value.to(tensor.device, copy=True)


def names_of(part: nn.Module, known: Known) -> dict[str, Any]:
    """What the names of buffers refer to, and those of plain attributes, unless it is known that nothing moves there."""
    names: dict[str, Any] = {}
    if known.is_new or (known.moving and not known.moving <= part._buffers.keys()):
        for name, value in vars(part).items():
            if isinstance(value, Tensor):
                names[name] = _ACTIVATION if value.requires_grad or value._is_view() else value
            elif value is None or isinstance(value, (int, float)):
                names[name] = value
    return {**names, **part._buffers}


def is_of_tensors(before: Any, after: Any) -> bool:
    """Whether a name that changed has to be changed back: not if it held an activation, or what torch.func put there."""
    is_lasting = not any(value is _ACTIVATION or is_wrapped(value) for value in (before, after))
    return is_lasting and any(isinstance(value, Tensor) for value in (before, after))


def refer(store: dict[str, Any], name: str, value: Any) -> None:
    """Let ``name`` refer to ``value`` again."""
    if value is NOTHING:
        store.pop(name, None)
    else:
        store[name] = value


def warn_of_late(name: str, tensor: Tensor) -> None:
    """Warn that there is no copy of a tensor as it was before it moved."""
    warnings.warn(
        f"Gradient regularization: the buffer {name!r} of shape {tuple(tensor.shape)} has begun to move. In this one step "
        "the second pass starts from its moved value, because buffers of that size are copied only where they move.",
        stacklevel=2,
    )
