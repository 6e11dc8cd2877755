"""``DeepSpeedZeroOptimizer_Stage3``: ZeRO stage 3."""

from typing import Any

import torch.distributed as dist
from torch import Tensor

from gradreg_optim.zero.storage import Fragment, Partitions

PRIVATE = (
    "_partition_all_parameters", "_unflatten_partitioned_parameters", "averaged_gradients",
    "dp_process_group", "fp16_groups", "fp16_partitioned_groups", "fp16_partitioned_groups_flat",
    "fp32_partitioned_groups_flat", "get_param_id", "loss_scale", "offload_optimizer", "optimizer",
    "persistent_parameters", "sub_group_to_group_id", "zero_grad",
)  # fmt: skip
PRIVATE_IF_OFFLOADED = ("norm_for_param_grads",)


class Stage3Partitions(Partitions):
    """Stage 3 gives every rank a slice of each parameter, and of masters, optimizer state and gradients.

    ::

        parameters    | weight A | bias B | weight C |
        rank 0        | A[0]     | B[0]   | C[0]     |    each slice is 1/N of its parameter, padded;
        rank 1        | A[1]     | B[1]   | C[1]     |    a bias shorter than N leaves some ranks with
        rank 2        | A[2]     | pad    | C[2]     |    padding only

    Partition i is a *sub-group*: all slices of one parameter group, or some of them if ``sub_group_size`` is
    small.

    Communication beyond the second forward and backward: one all-gather of the *persistent* parameters at
    each θ'. These are too small for DeepSpeed to release after use, so no forward gathers them again.
    Restoring the weights needs no communication: the next forward gathers every other parameter.

    Memory: where weights and masters are one tensor, the model gets a copy while it is at θ'. DeepSpeed
    intends this for fp32 training, but up to 0.19.8 it compares the devices wrongly and keeps two tensors.
    """

    MASTERS = "fp32_partitioned_groups_flat"

    def __init__(self, engine: Any) -> None:
        zero, fragments = engine.optimizer, []
        rank = dist.get_rank(zero.dp_process_group)
        for index, members in enumerate(zero.fp16_groups):
            start = 0
            for parameter in members:
                slice_size = parameter.partition_numel()
                size = min(slice_size, parameter.ds_numel - rank * slice_size)
                if size > 0:
                    fragments.append(
                        Fragment(parameter, zero.sub_group_to_group_id[index], index, start, size)
                    )
                start += slice_size
        super().__init__(engine, fragments, offloaded=bool(zero.offload_optimizer))

    def named_groups(self) -> list[dict[str, Any]]:
        """The model's trainable parameters, as parameter groups."""
        groups: list[dict[str, Any]] = [{"params": []} for _ in self.zero.optimizer.param_groups]
        for index, members in enumerate(self.zero.fp16_groups):
            groups[self.zero.sub_group_to_group_id[index]]["params"] += members
        return groups

    def _gradients_on_device(self) -> list[Tensor]:
        held = {
            id(parameter): gradient
            for index, members in enumerate(self.zero.fp16_groups)
            for parameter, gradient in zip(members, self.zero.averaged_gradients[index], strict=True)
        }
        return [held[id(fragment.parameter)].view(-1)[: fragment.size] for fragment in self.fragments]

    def _clear(self) -> None:
        super()._clear()
        self.zero.averaged_gradients = {}

    def restore(self) -> None:
        """Copy the masters into this rank's slices and release gathered parameters. Communication: none."""
        self.zero._partition_all_parameters()
        for index, master in enumerate(self._masters()):
            self.zero.fp16_partitioned_groups_flat[index].copy_(master)
            self.zero._unflatten_partitioned_parameters(index)

    def _writable(self) -> list[Tensor]:
        self.zero._partition_all_parameters()
        flat = list(self.zero.fp16_partitioned_groups_flat)
        for index, master in enumerate(self._masters()):
            if flat[index].data_ptr() == master.data_ptr():
                flat[index] = flat[index].detach().clone()
                members = self.zero.fp16_partitioned_groups[index]
                slices = flat[index].split([member.numel() for member in members])
                for member, own in zip(members, slices, strict=True):  # the engine's step points them back
                    member.data = own.view_as(member)
        return flat

    def _spread(self) -> None:
        persistent = self.zero.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)
