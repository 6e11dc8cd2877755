"""Where ``BF16_Optimizer`` (ZeRO stage 1 with bf16 weights and fp32 gradients) keeps gradients and weights.

``PRIVATE`` lists its attributes that are relied upon (deepspeed 0.18.5 to 0.19.8); ``tests/test_zero.py`` reports by name
each one that a new version lacks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradreg_optim.zero.gathered import GatheredPartitions, all_gather
from gradreg_optim.zero.storage import Fragment

PRIVATE = (
    "bf16_groups",
    "bf16_groups_flat",
    "bf16_partitioned_groups",
    "dp_process_group",
    "fp32_groups_flat_partition",
    "fp32_groups_gradient_flat_partition",
    "fp32_groups_gradients_flat",
    "fp32_groups_has_gradients",
    "optimizer",
    "real_dp_process_group",
    "update_lp_params",
    "zero_grad",
)


class BF16Partitions(GatheredPartitions):
    """``BF16_Optimizer``: masters and optimizer state are partitioned, the fp32 gradients are whole on every rank.

    The first gradient is kept of this rank's slice alone, and the combined one computed there.

    Communication beyond that of :class:`GatheredPartitions`: one all-gather of the combined fp32 gradient, because the
    engine's step takes norm and clip from whole gradients without asking other ranks.
    """

    offloaded = False  # DeepSpeed offloads nothing here

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
        self._reached: list[list[bool]] = []

    @property
    def parameters(self) -> list[list[nn.Parameter]]:
        """Those that DeepSpeed has flattened into ``bf16_groups_flat``."""
        return [list(group) for group in self.zero.bf16_groups]

    @property
    def loss_scale(self) -> float:
        """There is none in bf16."""
        return 1.0

    def gradients(self) -> list[Tensor]:
        """Views of this rank's slice of DeepSpeed's gradient buffers."""
        slices = self.zero.fp32_groups_gradient_flat_partition
        return [fragment.of(slices[fragment.index]) for fragment in self.fragments]

    def _take_first(self) -> list[Tensor]:
        """Copies: the next backward adds to the same buffers."""
        self.first = [gradient.clone() for gradient in self.gradients()]
        self._reached = [list(reached) for reached in self.zero.fp32_groups_has_gradients]
        self._clear()
        return self.first

    def take_sum(self) -> list[Tensor]:
        """Copies; which parameters were reached stays noted, for the step that will use them."""
        reached = [list(group) for group in self.zero.fp32_groups_has_gradients]
        taken = super().take_sum()
        self.zero.fp32_groups_has_gradients = reached
        return taken

    def _clear(self) -> None:
        self.zero.zero_grad()

    def _return_first(self) -> None:
        """The copies go back into the buffers of every rank, over the group that works after an exception as well."""
        self._clear()
        torch._foreach_copy_(self.gradients(), self.first)
        for whole, own in self._buffers():
            self._collect(whole, own)
        self.zero.fp32_groups_has_gradients = self._reached

    def _release(self) -> None:
        """The note on which parameters had gradients goes too."""
        super()._release()
        self._reached = []

    def _note_written(self) -> None:
        """Every rank gets the combined gradient, of all parameters that either pass has reached."""
        for index, (whole, own) in enumerate(self._buffers()):
            group = self.zero.real_dp_process_group[index]
            if dist.get_world_size(group) > 1:
                all_gather(whole, own, group=group)
        for reached, before in zip(self.zero.fp32_groups_has_gradients, self._reached, strict=True):
            reached[:] = [now or then for now, then in zip(reached, before, strict=True)]

    def _buffers(self) -> list[tuple[Tensor, Tensor]]:
        """The flat gradient of each group, and this rank's slice of it."""
        pairs = zip(self.zero.fp32_groups_gradients_flat, self.zero.fp32_groups_gradient_flat_partition, strict=True)
        return list(pairs)

    def _whole(self) -> list[Tensor]:
        return self.zero.bf16_groups_flat  # type: ignore[no-any-return]

    def _master(self, index: int) -> Tensor:
        return self.zero.fp32_groups_flat_partition[index].detach()  # type: ignore[no-any-return]

    def _own(self, index: int) -> Tensor:
        rank = dist.get_rank(self.zero.real_dp_process_group[index])
        return self.zero.bf16_partitioned_groups[index][rank]  # type: ignore[no-any-return]
