"""What ZeRO optimizers have in common whose ranks all hold the bit16 weights, each its own slice to write."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gradreg_optim.zero.storage import Fragment, Partitions

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13

RESCUE_TIMEOUT = timedelta(hours=1)
"""How long a rank that failed waits for the others, which notice when their own collective times out."""


class GatheredPartitions(Partitions):
    """Every rank holds all bit16 weights, and its slice of masters and optimizer state.

    ::

        group i       | weight A      | bias B | weight C           | pad |
        bit16         |———— rank 0 ————|———— rank 1 ————|———— rank 2 ————|   on every rank
        fp32 masters  |  A[:m]         |                |                |   on rank 0, and so on

    A rank may own parts of two parameters and all of none, or nothing but padding.

    Communication: one all-gather of the bit16 weights on the way to θ'. The way back is the gather that ends the engine's
    step. After an exception the slices are gathered over a gloo group of their own, where ranks meet that failed at
    different places: the usual group is not usable any more once a collective timed out in it.
    """

    def __init__(self, engine: Any, fragments: list[Fragment]) -> None:
        super().__init__(engine, fragments)
        self._rescuers = dist.new_group(backend="gloo", timeout=RESCUE_TIMEOUT)

    @abstractmethod
    def _whole(self) -> list[Tensor]:
        """The flat bit16 weights of each group."""

    @abstractmethod
    def _own(self, index: int) -> Tensor:
        """This rank's slice of ``_whole()[index]``."""

    def restore(self) -> None:
        """One all-gather, of the usual kind."""
        self.zero.update_lp_params()

    def rescue(self) -> None:
        """One all-gather over a group that no collective can have timed out in."""
        for index, whole in enumerate(self._whole()):
            self._collect(whole, self._master(index))

    def _collect(self, whole: Tensor, own: Tensor) -> None:
        """Fill ``whole`` with every rank's slice, by way of the CPU."""
        own = own.to("cpu", whole.dtype)
        slices = [torch.empty_like(own) for _ in range(dist.get_world_size(self._rescuers))]
        dist.all_gather(slices, own, group=self._rescuers)
        whole.copy_(torch.cat(slices))

    def _writable(self) -> Callable[[int], Tensor]:
        return self._own

    def _spread(self) -> None:
        for index, whole in enumerate(self._whole()):
            group = self.zero.real_dp_process_group[index]
            if dist.get_world_size(group) > 1:
                all_gather(whole, self._own(index), group=group)
