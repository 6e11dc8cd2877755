"""Where ``DeepSpeedZeroOptimizer_Stage3`` keeps gradients and weights.

``PRIVATE`` lists its attributes that are relied upon (deepspeed 0.18.5 to 0.19.8); ``tests/test_zero.py`` reports by name
each one that a new version lacks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradreg_optim.zero.storage import Fragment, Partitions, await_copies

PRIVATE = (
    "_partition_all_parameters",
    "_unflatten_partitioned_parameters",
    "averaged_gradients",
    "dp_process_group",
    "fp16_groups",
    "fp16_partitioned_groups",
    "fp16_partitioned_groups_flat",
    "fp32_partitioned_groups_flat",
    "get_param_id",
    "loss_scale",
    "offload_optimizer",
    "optimizer",
    "persistent_parameters",
    "sub_group_to_group_id",
    "zero_grad",
)
PRIVATE_IF_OFFLOADED = ("norm_for_param_grads",)


class Stage3Partitions(Partitions):
    """ZeRO 3: every rank holds a slice of each parameter, and masters, optimizer state and gradients laid out alike.

    ::

        parameters        | weight A     | bias B | weight C         |
        rank 0            | A[0] | B[0] | C[0] |                         each slice is 1/N of its parameter, padded;
        rank 1            | A[1] | B[1] | C[1] |                         a bias shorter than N leaves some rank with
        rank 2            | A[2] | pad  | C[2] |                         padding only

    Partition i is a *sub-group*: all slices of one parameter group, or a stretch of them if ``sub_group_size`` is small.

    Communication beyond the second forward's and backward's: none, except one all-gather of the *persistent* parameters,
    those too small to be released after use, which no forward would gather again. The way back needs none: the next
    forward gathers whatever is partitioned.

    Where weights and masters have one dtype and device (fp32 training), DeepSpeed means to keep them as one tensor (up to
    0.19.8 it compares the devices wrongly and does not). The model would then be given a tensor of its own for the time at
    θ', at the price of a second partition, and the masters stay as they are here too.
    """

    def __init__(self, engine: Any) -> None:
        zero, fragments = engine.optimizer, []
        rank = dist.get_rank(zero.dp_process_group)
        for index, members in enumerate(zero.fp16_groups):
            start = 0
            for parameter in members:
                slice_size = parameter.partition_numel()
                size = min(slice_size, parameter.ds_numel - rank * slice_size)
                if size > 0:
                    fragments.append(Fragment(parameter, zero.sub_group_to_group_id[index], index, start, size))
                start += slice_size
        super().__init__(engine, fragments)
        self.offloaded = bool(zero.offload_optimizer)
        self._buffers: dict[int, Any] = {}

    @property
    def parameters(self) -> list[list[nn.Parameter]]:
        """Those of all sub-groups of a group."""
        found: list[list[nn.Parameter]] = [[] for _ in self.zero.optimizer.param_groups]
        for index, members in enumerate(self.zero.fp16_groups):
            found[self.zero.sub_group_to_group_id[index]] += members
        return found

    def gradients(self) -> list[Tensor]:
        """Views of DeepSpeed's gradient buffers, or of the masters' ``.grad`` on the CPU."""
        if self.offloaded:
            await_copies()
            masters = self.zero.fp32_partitioned_groups_flat
            return [fragment.of(masters[fragment.index].grad) for fragment in self.fragments]
        held = {
            id(parameter): gradient
            for index, members in enumerate(self.zero.fp16_groups)
            for parameter, gradient in zip(members, self.zero.averaged_gradients[index], strict=True)
        }
        return [held[id(fragment.parameter)].view(-1)[: fragment.size] for fragment in self.fragments]

    def _take_first(self) -> list[Tensor]:
        """Copies: the next backward writes into the same buffers."""
        self.first = [gradient.clone() for gradient in self.gradients()]
        self._buffers = self.zero.averaged_gradients
        self._clear()
        return self.first

    def _clear(self) -> None:
        self.zero.zero_grad()
        self.zero.averaged_gradients = {}
        if self.offloaded:
            self.zero.norm_for_param_grads = {}

    def _return_first(self) -> None:
        """The copies go back into the buffers."""
        self._clear()
        self.zero.averaged_gradients = self._buffers
        torch._foreach_copy_(self.gradients(), self.first)
        self._note_written()

    def _release(self) -> None:
        """The list of the buffers goes too."""
        super()._release()
        self._buffers = {}

    def restore(self) -> None:
        """No communication: only this rank's slices are written, and nothing stays gathered."""
        self.zero._partition_all_parameters()
        for index, weights in enumerate(self.zero.fp16_partitioned_groups_flat):
            weights.copy_(self._master(index))
            self.zero._unflatten_partitioned_parameters(index)

    def _master(self, index: int) -> Tensor:
        return self.zero.fp32_partitioned_groups_flat[index].detach()  # type: ignore[no-any-return]

    def _writable(self) -> Callable[[int], Tensor]:
        self.zero._partition_all_parameters()
        flat = list(self.zero.fp16_partitioned_groups_flat)
        for index, weights in enumerate(flat):
            if weights.data_ptr() == self._master(index).data_ptr():
                flat[index] = weights.detach().clone()
                start = 0
                for member in self.zero.fp16_partitioned_groups[index]:  # the engine's step points them back
                    member.data = flat[index].narrow(0, start, member.numel()).view_as(member)
                    start += member.numel()
        return flat.__getitem__

    def _spread(self) -> None:
        persistent = self.zero.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)
