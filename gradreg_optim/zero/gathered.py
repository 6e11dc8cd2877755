"""The common part of stages 1 and 2 and ``BF16_Optimizer``: every rank holds all bit16 weights and writes one slice."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gradreg_optim.zero.storage import Fragment, Partitions

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13

RESCUE_TIMEOUT = timedelta(hours=1)
"""How long a rank that failed waits for the others, which fail only when their own collective times out."""


class GatheredPartitions(Partitions):
    """Every rank holds all bit16 weights, and its own slice of fp32 masters and optimizer state.

    ::

        group i       | weight A      | bias B | weight C           | pad |
        bit16         |———— rank 0 ————|———— rank 1 ————|———— rank 2 ————|   on every rank
        fp32 masters  |  A[:m]         |                |                |   on rank 0, and so on

    A slice may hold parts of several parameters, or nothing but padding.

    Communication: one all-gather of the bit16 weights at each θ'. The gather at the end of the engine's step replaces
    θ'. After an exception the slices are gathered over a separate gloo group: ranks may have failed at different places,
    and a process group cannot be used any more once a collective has timed out in it.
    """

    # Names of DeepSpeed's attributes, which hold, for each group:
    PARAMETERS: str  # the model's parameters
    WEIGHTS: str  # the flat bit16 weights
    SLICES: str  # views of those weights, one a rank

    def __init__(self, engine: Any, fragments: list[Fragment]) -> None:
        super().__init__(engine, fragments)
        self._rescuers = dist.new_group(backend="gloo", timeout=RESCUE_TIMEOUT)

    def named_groups(self) -> list[dict[str, Any]]:
        """The model's trainable parameters, as parameter groups."""
        return [{"params": parameters} for parameters in getattr(self.zero, self.PARAMETERS)]

    def restore(self) -> None:
        """Copy the masters into the weights. Communication: one all-gather of the bit16 weights."""
        self.zero.update_lp_params()

    def _rescue(self) -> None:
        self._gather_on_cpu(getattr(self.zero, self.WEIGHTS), self._masters())

    def _writable(self) -> list[Tensor]:
        pairs = zip(getattr(self.zero, self.SLICES), self.zero.real_dp_process_group, strict=True)
        return [slices[dist.get_rank(group)] for slices, group in pairs]

    def _spread(self) -> None:
        self._gather(getattr(self.zero, self.WEIGHTS), self._writable())

    def _gather(self, wholes: Iterable[Tensor], slices: Iterable[Tensor]) -> None:
        """Fill each whole tensor, one a group, with the slices of all ranks."""
        for whole, own, group in zip(wholes, slices, self.zero.real_dp_process_group, strict=True):
            if dist.get_world_size(group) > 1:
                all_gather(whole, own, group=group)

    def _gather_on_cpu(self, wholes: Iterable[Tensor], slices: Iterable[Tensor]) -> None:
        """:meth:`_gather` through the group that still works after an exception."""
        for whole, own in zip(wholes, slices, strict=True):
            own = own.to("cpu", whole.dtype)
            received = [torch.empty_like(own) for _ in range(dist.get_world_size(self._rescuers))]
            dist.all_gather(received, own, group=self._rescuers)
            whole.copy_(torch.cat(received))
