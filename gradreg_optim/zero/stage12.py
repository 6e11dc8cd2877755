"""Where ``DeepSpeedZeroOptimizer`` (ZeRO stages 1 and 2) keeps gradients and weights.

``PRIVATE`` lists its attributes that are relied upon (deepspeed 0.18.5 to 0.19.8); ``tests/test_zero.py`` reports by name
each one that a new version lacks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradreg_optim.core.local import detached_from_bucket
from gradreg_optim.zero.gathered import GatheredPartitions
from gradreg_optim.zero.storage import Fragment, await_copies

PRIVATE = (
    "all_grad_tensors",
    "averaged_gradients",
    "bit16_groups",
    "bit16_groups_flat",
    "cpu_offload",
    "dp_process_group",
    "get_param_id",
    "grad_partition_insertion_offset",
    "grad_start_offset",
    "loss_scale",
    "micro_step_id",
    "optimizer",
    "parallel_partitioned_bit16_groups",
    "params_in_partition",
    "partition_size",
    "real_dp_process_group",
    "single_partition_of_fp32_groups",
    "update_lp_params",
    "zero_grad",
)
PRIVATE_IF_OFFLOADED = ("local_overflow", "norm_for_param_grads")

NO_MICRO_STEP = -1
"""``micro_step_id`` of stages 1 and 2 before the first backward of a window (their ``INITIAL_MICRO_STEP_ID``)."""


class Stage12Partitions(GatheredPartitions):
    """ZeRO 1 and 2: gradients are partitioned like masters and optimizer state (stage 1 keeps the others' too)."""

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
        self._kept: dict[int, Any] = {}

    @property
    def parameters(self) -> list[list[nn.Parameter]]:
        """Those that DeepSpeed has flattened into ``bit16_groups_flat``."""
        return [list(group) for group in self.zero.bit16_groups]

    def gradients(self) -> list[Tensor]:
        """Views of ``averaged_gradients``, or of the masters' ``.grad`` on the CPU."""
        if self.offloaded:
            await_copies()
            partitions = self.zero.single_partition_of_fp32_groups
            return [fragment.of(partitions[fragment.index].grad) for fragment in self.fragments]
        pieces: dict[tuple[int, int], Tensor] = {}
        for index, held in self.zero.averaged_gradients.items():
            start = 0
            for position, piece in enumerate(held):  # the pieces concatenate to the partition, padding included
                if not piece.is_contiguous():  # so that the flat view below is a view
                    held[position] = piece.contiguous()
                pieces[index, start] = held[position].view(-1)
                start += piece.numel()
        return [pieces[fragment.index, fragment.start] for fragment in self.fragments]

    def _take_first(self) -> list[Tensor]:
        """The gradients themselves; copies only of offloaded ones, whose buffers are used again."""
        if self.offloaded:
            self.first = [gradient.clone() for gradient in self.gradients()]
        else:  # the next backward makes new ones
            for held in self.zero.averaged_gradients.values():
                # The end of a partition cuts a parameter: DeepSpeed keeps a view, and with it the whole gradient.
                held[:] = [detached_from_bucket(piece) for piece in held]
            self.first = self.gradients()
            self._kept = dict(self.zero.averaged_gradients)
        self._clear()
        return self.first

    def _clear(self) -> None:
        self.zero.zero_grad()
        self.zero.micro_step_id = NO_MICRO_STEP
        for index in range(len(self.zero.bit16_groups)):
            self.zero.averaged_gradients[index] = self.zero.all_grad_tensors[index] = None
        if self.offloaded:
            self.zero.norm_for_param_grads = {}
            self.zero.local_overflow = False

    def _return_first(self) -> None:
        """What the second pass has accumulated is dropped."""
        self._clear()
        if self.offloaded:
            torch._foreach_copy_(self.gradients(), self.first)
        else:
            self.zero.averaged_gradients.update(self._kept)
        self._note_written()

    def _release(self) -> None:
        """The lists in which DeepSpeed kept them go too."""
        super()._release()
        self._kept = {}

    def _whole(self) -> list[Tensor]:
        return self.zero.bit16_groups_flat  # type: ignore[no-any-return]

    def _master(self, index: int) -> Tensor:
        return self.zero.single_partition_of_fp32_groups[index].detach()  # type: ignore[no-any-return]

    def _own(self, index: int) -> Tensor:
        rank = dist.get_rank(self.zero.real_dp_process_group[index])
        return self.zero.parallel_partitioned_bit16_groups[index][rank]  # type: ignore[no-any-return]
