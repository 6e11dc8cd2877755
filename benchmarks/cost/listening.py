"""Counts what a process sends and holds: collective calls of torch.distributed, and bytes of live tensors."""

from __future__ import annotations

import gc
import warnings
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["Listener", "bytes_alive"]

COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_single",
    "all_reduce",
    "all_to_all_single",
    "broadcast",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "reduce_scatter_single",
)
ALIASES = {
    "all_gather_into_tensor": "all_gather",
    "all_gather_single": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter",
}


class Listener:
    """Counts the calls of torch.distributed's collectives, and the bytes of the largest tensor given to each
    call.

    It replaces the functions in the module, so make it before anything that keeps references to them is
    imported.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._is_inside = False
        for name in COLLECTIVES:
            if hasattr(dist, name):
                setattr(dist, name, self._listening(name, getattr(dist, name)))

    def _listening(self, name: str, function: Any) -> Any:
        def listening(*args: Any, **kwargs: Any) -> Any:
            if self._is_inside:  # one collective that is implemented by another counts once
                return function(*args, **kwargs)
            lists = [value if isinstance(value, list) else [value] for value in (*args, *kwargs.values())]
            sizes = [
                sum(t.nbytes for t in tensors)
                for tensors in lists
                if all(isinstance(t, torch.Tensor) for t in tensors)
            ]
            self.counts[f"{ALIASES.get(name, name)} calls"] += 1
            self.counts[f"{ALIASES.get(name, name)} bytes"] += max(sizes, default=0)
            self._is_inside = True
            try:
                return function(*args, **kwargs)
            finally:
                self._is_inside = False

        return listening

    def since_last(self) -> Counter[str]:
        """The counts since the last call."""
        counts, self.counts = self.counts, Counter()
        return counts


def bytes_alive() -> int:
    """Bytes of all tensor storages that Python objects refer to."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # isinstance() on a deprecated object warns
        tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
