"""``DeepSpeedZeroOptimizer``: ZeRO stages 1 and 2."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch.distributed as dist
from torch import Tensor

from gradreg_optim.core.local import detached_from_bucket
from gradreg_optim.zero.gathered import GatheredPartitions
from gradreg_optim.zero.storage import Fragment

PRIVATE = (
    "all_grad_tensors", "averaged_gradients", "bit16_groups", "bit16_groups_flat", "cpu_offload", "dp_process_group",
    "get_param_id", "grad_partition_insertion_offset", "grad_start_offset", "loss_scale", "micro_step_id", "optimizer",
    "parallel_partitioned_bit16_groups", "params_in_partition", "partition_size", "real_dp_process_group",
    "single_partition_of_fp32_groups", "update_lp_params", "zero_grad",
)  # fmt: skip
PRIVATE_IF_OFFLOADED = ("local_overflow", "norm_for_param_grads")


class Stage12Partitions(GatheredPartitions):
    """Stages 1 and 2 partition gradients, masters and optimizer state alike; stage 1 also keeps the other ranks' gradients.

    Memory: without offload g1 is not copied, except where DeepSpeed accumulated it in views of larger tensors. The next
    backward accumulates in new tensors.
    """

    MASTERS, RECORDS = "single_partition_of_fp32_groups", "averaged_gradients"
    PARAMETERS, WEIGHTS, SLICES = "bit16_groups", "bit16_groups_flat", "parallel_partitioned_bit16_groups"

    def __init__(self, engine: Any) -> None:
        zero, fragments = engine.optimizer, []
        for group, members in enumerate(zero.params_in_partition):
            rank = dist.get_rank(zero.real_dp_process_group[group])
            for parameter in members:
                key = zero.get_param_id(parameter)
                start = int(zero.grad_partition_insertion_offset[group][rank][key])
                skipped = int(zero.grad_start_offset[group][rank][key])
                size = min(parameter.numel() - skipped, int(zero.partition_size[group]) - start)
                if size > 0:
                    fragments.append(Fragment(parameter, group, group, start, size))
        super().__init__(engine, fragments)
        self.offloaded = bool(zero.cpu_offload)

    def _gradients_on_device(self) -> list[Tensor]:
        found: dict[tuple[int, int], Tensor] = {}
        for index, tensors in self.zero.averaged_gradients.items():  # they concatenate to the partition, with padding
            tensors[:] = [tensor.contiguous() for tensor in tensors]  # a flat view needs contiguous memory
            starts = accumulate((tensor.numel() for tensor in tensors), initial=0)
            found |= {(index, start): tensor.view(-1) for start, tensor in zip(starts, tensors, strict=False)}
        return [found[fragment.index, fragment.start] for fragment in self.fragments]

    def _detach_first(self) -> list[Tensor]:
        if self.offloaded:
            return super()._detach_first()
        for tensors in self.zero.averaged_gradients.values():
            # DeepSpeed keeps a view of a parameter that the partition's end cuts, and with it the whole gradient.
            tensors[:] = [detached_from_bucket(tensor) for tensor in tensors]
        return self.gradients()

    def _clear(self) -> None:
        super()._clear()
        self.zero.micro_step_id = -1  # as before the first backward of a window: INITIAL_MICRO_STEP_ID
        for index in range(len(self.zero.bit16_groups)):
            self.zero.averaged_gradients[index] = self.zero.all_grad_tensors[index] = None
        if self.offloaded:
            self.zero.local_overflow = False
