"""Tensors that pretend to be on a GPU: they compute on the CPU, and raise where they meet tensors of the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map


class Elsewhere(Tensor):
    """Shares memory with the tensor that it wraps; ``device`` says cuda. Only copies may go from one device to the other."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        wrapped = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="cuda:0",
        )
        wrapped.inner = inner
        return wrapped

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        is_copy = "copy" in func.__name__
        if not is_copy and len({isinstance(x, Elsewhere) for x in tensors if x.dim()}) > 1:
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found cpu and cuda:0")
        goes_home = func is torch.ops.aten._to_copy.default and torch.device(kwargs.get("device", "cuda")).type == "cpu"
        if func is torch.ops.aten._to_copy.default:
            kwargs.pop("device", None)
        out = func(*tree_map(unwrapped, args), **tree_map(unwrapped, kwargs))
        if goes_home or not (
            isinstance(tensors[0], Elsewhere) if is_copy else any(isinstance(x, Elsewhere) for x in tensors)
        ):
            return out
        return tree_map(lambda x: Elsewhere(x) if isinstance(x, Tensor) else x, out)


def unwrapped(value: Any) -> Any:
    return value.inner if isinstance(value, Elsewhere) else value
