"""``BF16_Optimizer``: ZeRO stage 1 with bf16 weights and fp32 gradients."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch.distributed as dist
from torch import Tensor

from gradreg_optim.core.step import FirstGradient
from gradreg_optim.zero.gathered import GatheredPartitions
from gradreg_optim.zero.storage import Fragment

PRIVATE = (
    "bf16_groups", "bf16_groups_flat", "bf16_partitioned_groups", "dp_process_group", "fp32_groups_flat_partition",
    "fp32_groups_gradient_flat_partition", "fp32_groups_gradients_flat", "fp32_groups_has_gradients", "optimizer",
    "real_dp_process_group", "update_lp_params", "zero_grad",
)  # fmt: skip


class BF16Partitions(GatheredPartitions):
    """``BF16_Optimizer`` partitions masters and optimizer state; every rank holds the whole fp32 gradient.

    g1 is kept, and the combined gradient computed, for this rank's slice alone.

    Communication beyond :class:`GatheredPartitions`: one all-gather of the combined fp32 gradient, because the engine's
    step computes norm and clip from the whole gradient on each rank.
    """

    MASTERS, RECORDS = "fp32_groups_flat_partition", "fp32_groups_has_gradients"
    PARAMETERS, WEIGHTS, SLICES = "bf16_groups", "bf16_groups_flat", "bf16_partitioned_groups"

    def __init__(self, engine: Any) -> None:
        zero, fragments = engine.optimizer, []
        for index, members in enumerate(zero.bf16_groups):
            size = zero.fp32_groups_flat_partition[index].numel()
            first, offset = dist.get_rank(zero.real_dp_process_group[index]) * size, 0
            for parameter in members:
                start, end = max(offset, first), min(offset + parameter.numel(), first + size)
                if start < end:
                    fragments.append(Fragment(parameter, index, index, start - first, end - start))
                offset += parameter.numel()
        super().__init__(engine, fragments)

    def _gradients_on_device(self) -> list[Tensor]:
        slices = self.zero.fp32_groups_gradient_flat_partition
        return [fragment.of(slices[fragment.index]) for fragment in self.fragments]

    def take_sum(self) -> list[Tensor]:
        """Copy and clear the gradients, but keep DeepSpeed's record of which exist: the engine's step needs it."""
        records = copy(self.zero.fp32_groups_has_gradients)
        taken = super().take_sum()
        self.zero.fp32_groups_has_gradients = records
        return taken

    def _return_first(self) -> None:
        super()._return_first()
        self._gather_on_cpu(self.zero.fp32_groups_gradients_flat, self.zero.fp32_groups_gradient_flat_partition)

    def keep(self, first: FirstGradient) -> None:
        """Gather the combined gradient on every rank, record which parameters any pass has reached, and release g1."""
        self._gather(self.zero.fp32_groups_gradients_flat, self.zero.fp32_groups_gradient_flat_partition)
        for reached, before in zip(self.zero.fp32_groups_has_gradients, self._records, strict=True):
            reached[:] = [now or then for now, then in zip(reached, before, strict=True)]
        super().keep(first)
