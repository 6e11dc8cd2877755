"""ZeRO stages 1 and 2, and ``BF16_Optimizer``: every rank holds all bit16 weights and writes one slice."""

from collections.abc import Iterable
from datetime import timedelta
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gradreg_optim.core.local import detached_from_bucket
from gradreg_optim.core.step import FirstGradient
from gradreg_optim.zero.storage import Fragment, Partitions

PRIVATE = (
    "all_grad_tensors", "averaged_gradients", "bit16_groups", "bit16_groups_flat", "cpu_offload",
    "dp_process_group", "get_param_id", "grad_partition_insertion_offset", "grad_start_offset", "loss_scale",
    "micro_step_id", "optimizer", "parallel_partitioned_bit16_groups", "params_in_partition",
    "partition_size", "real_dp_process_group", "single_partition_of_fp32_groups", "update_lp_params",
    "zero_grad",
)  # fmt: skip
PRIVATE_IF_OFFLOADED = ("local_overflow", "norm_for_param_grads")
PRIVATE_BF16 = (
    "bf16_groups", "bf16_groups_flat", "bf16_partitioned_groups", "dp_process_group",
    "fp32_groups_flat_partition", "fp32_groups_gradient_flat_partition", "fp32_groups_gradients_flat",
    "fp32_groups_has_gradients", "optimizer", "real_dp_process_group", "update_lp_params", "zero_grad",
)  # fmt: skip

# Its name since torch 2.13, and before.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

RESCUE_TIMEOUT = timedelta(hours=1)
"""How long a rank that failed waits for the others, which fail only when their own collective times out."""


class GatheredPartitions(Partitions):
    """Every rank holds all bit16 weights, and its own slice of fp32 masters and optimizer state.

    ::

        group i       | weight A      | bias B | weight C           | pad |
        bit16         |———— rank 0 ————|———— rank 1 ————|———— rank 2 ————|   on every rank
        fp32 masters  |  A[:m]         |                |                |   on rank 0, and so on

    A slice may hold parts of several parameters, or nothing but padding.

    Communication: one all-gather of the bit16 weights at each θ'. The gather at the end of the engine's step
    replaces θ'. After an exception the slices are gathered over a separate gloo group: ranks may have failed
    at different places, and a process group cannot be used any more once a collective has timed out in it.
    """

    # Names of DeepSpeed's attributes, which hold, for each group, the model's parameters, the flat bit16
    # weights, and views of those weights, one a rank.
    PARAMETERS = WEIGHTS = SLICES = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
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


class Stage12Partitions(GatheredPartitions):
    """Stages 1 and 2 partition gradients, masters and optimizer state alike.

    Memory: without offload g1 is not copied, except where DeepSpeed accumulated it in views of larger
    tensors. The next backward accumulates in new tensors. Stage 1 also keeps the gradients of the other
    ranks' slices.
    """

    MASTERS = "single_partition_of_fp32_groups"
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
        super().__init__(engine, fragments, offloaded=bool(zero.cpu_offload))

    def _gradients_on_device(self) -> list[Tensor]:
        found: dict[tuple[int, int], Tensor] = {}
        # They concatenate to the partition, with padding.
        for index, tensors in self.zero.averaged_gradients.items():
            tensors[:] = [tensor.contiguous() for tensor in tensors]  # a flat view needs contiguous memory
            starts = accumulate((tensor.numel() for tensor in tensors), initial=0)
            found |= {(index, start): tensor.view(-1) for start, tensor in zip(starts, tensors, strict=False)}
        return [found[fragment.index, fragment.start] for fragment in self.fragments]

    def _detached(self) -> list[Tensor]:
        if self.offloaded:
            return super()._detached()
        for tensors in self.zero.averaged_gradients.values():
            # Where a partition ends inside a parameter DeepSpeed keeps a view, and so the whole gradient.
            tensors[:] = [detached_from_bucket(tensor) for tensor in tensors]
        return self.see_sum()

    def _clear(self) -> None:
        super()._clear()
        self.zero.micro_step_id = -1  # as before the first backward of a window: INITIAL_MICRO_STEP_ID
        for index in range(len(self.zero.bit16_groups)):
            self.zero.averaged_gradients[index] = self.zero.all_grad_tensors[index] = None


class BF16Partitions(GatheredPartitions):
    """``BF16_Optimizer``: stage 1 with bf16 weights. Every rank holds the whole gradient, in fp32.

    Each rank keeps g1, and computes the combined gradient, for its own slice.

    Communication beyond :class:`GatheredPartitions`: one all-gather of the combined fp32 gradient, because
    the engine's step computes norm and clip from the whole gradient on each rank.
    """

    MASTERS = "fp32_groups_flat_partition"
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

    def _return_first(self) -> None:
        super()._return_first()
        self._gather_on_cpu(
            self.zero.fp32_groups_gradients_flat, self.zero.fp32_groups_gradient_flat_partition
        )

    def keep(self, first: FirstGradient) -> None:
        """Gather the combined gradient on every rank and release g1."""
        self._gather(self.zero.fp32_groups_gradients_flat, self.zero.fp32_groups_gradient_flat_partition)
        super().keep(first)

    def _release(self) -> None:
        super()._release()
        # The engine's norm leaves out parameters that are marked False. One without gradient adds 0 to it.
        self.zero.fp32_groups_has_gradients[:] = [[True] * len(group) for group in self.zero.bf16_groups]
