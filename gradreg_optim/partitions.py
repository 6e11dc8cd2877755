"""Where DeepSpeed's ZeRO optimizers keep gradients and weights: the only file that touches their internals.

Private attributes relied upon (deepspeed 0.18.5 to 0.19.8), by the stage whose optimizer has them. ``tests/test_zero.py``
reports by name each one that a new version lacks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradreg_optim.finite_difference import Scalar, arrival

__all__ = ["PRIVATE", "Fragment", "Partitions", "Stage3Partitions", "Stage12Partitions"]

_STAGE_1_2 = (
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
_STAGE_1_2_OFFLOAD = ("local_overflow", "norm_for_param_grads")
_STAGE_3 = (
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
_STAGE_3_OFFLOAD = ("norm_for_param_grads",)

PRIVATE = {
    "stage 1 and 2": _STAGE_1_2,
    "stage 1 and 2, offloaded": _STAGE_1_2_OFFLOAD,
    "stage 3": _STAGE_3,
    "stage 3, offloaded": _STAGE_3_OFFLOAD,
}

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13

RESCUE_TIMEOUT = timedelta(hours=1)
"""How long a rank that failed waits for the others, which notice when their own collective times out."""

NO_MICRO_STEP = -1
"""``micro_step_id`` of stages 1 and 2 before the first backward of a window (their ``INITIAL_MICRO_STEP_ID``)."""


@dataclass(frozen=True)
class Fragment:
    """The part of one parameter that this rank owns: elements ``start`` to ``start + size`` of partition ``index``.

    ``group`` is the optimizer's parameter group. The padding between and behind parameters belongs to no fragment.
    """

    parameter: nn.Parameter
    group: int
    index: int
    start: int
    size: int

    def of(self, partition: Tensor) -> Tensor:
        """This fragment's elements of a flat tensor that is laid out like the partition."""
        return partition.view(-1).narrow(0, self.start, self.size)


class Partitions(ABC):
    """This rank's share of gradients, fp32 masters and bit16 weights, as the phases of a step see it.

    ``zero`` is DeepSpeed's optimizer. Nothing here writes into the masters.
    """

    offloaded: bool

    def __init__(self, zero: Any, fragments: list[Fragment]) -> None:
        self.zero = zero
        self.fragments = fragments
        self.first: list[Tensor] = []

    @property
    @abstractmethod
    def parameters(self) -> list[list[nn.Parameter]]:
        """The model's trainable parameters, by the optimizer's groups."""

    @abstractmethod
    def gradients(self) -> list[Tensor]:
        """The gradient of each fragment, averaged over ranks and micro-batches, where the engine's step will read it."""

    @abstractmethod
    def take_gradients(self) -> list[Tensor]:
        """The gradients again, out of the reach of the next backward; the engine is left as after ``zero_grad``."""

    @abstractmethod
    def put_back(self) -> None:
        """Make the gradients that were taken the engine's again."""

    def release(self) -> None:
        """Let go of the gradients that were taken."""
        self.first = []

    @abstractmethod
    def restore(self) -> None:
        """Bring the model's weights back to the masters, as the engine's step would; every rank takes part."""

    def rescue(self) -> None:
        """Do the same after an exception, when other ranks may still be waiting in a collective of the second pass."""
        self.restore()

    @abstractmethod
    def _master(self, index: int) -> Tensor:
        """The fp32 masters of partition ``index``."""

    @abstractmethod
    def _writable(self) -> Callable[[int], Tensor]:
        """Prepare the model's weights for being written; the returned function gives those of partition ``index``."""

    @abstractmethod
    def _spread(self) -> None:
        """Let the model on every rank see what was written."""

    def shift(self, along: Iterator[tuple[Scalar, Tensor | None]]) -> list[tuple[Tensor, Tensor]]:
        """Write round(master + ε·d) into the model's weights, on every rank.

        Args:
            along: for each fragment ε and d; ``None`` leaves the fragment at θ.

        Returns:
            For each fragment ⟨θ'_real − θ, d⟩ and ‖d‖² on a sample, where θ'_real is what rounding has left of θ'.
        """
        weights = self._writable()
        arrived = []
        for fragment, (eps, direction) in zip(self.fragments, along, strict=True):
            if direction is None:
                arrived.append((torch.zeros(()), torch.zeros(())))
                continue
            weight, master = fragment.of(weights(fragment.index)), fragment.of(self._master(fragment.index))
            if isinstance(eps, Tensor):
                moved = direction.to(master.dtype).mul(eps).add_(master)
            else:
                moved = torch.add(master, direction, alpha=eps)
            moved = moved.to(weight.dtype)
            arrived.append(arrival([master.to(weight.dtype)], [moved], [direction]))
            weight.copy_(moved)
        self._spread()
        return arrived

    def gradients_written(self) -> None:
        """Called when the engine's gradients were changed: what the engine noted about them has to follow."""
        if self.offloaded:  # norms and overflow were noted while the gradients went to the CPU
            norms: dict[int, Tensor] = {}
            for fragment, gradient in zip(self.fragments, self.gradients(), strict=True):
                norms[self.zero.get_param_id(fragment.parameter)] = gradient.norm()
            self.zero.norm_for_param_grads = norms
            if hasattr(self.zero, "local_overflow"):
                self.zero.local_overflow = not all(bool(torch.isfinite(norm)) for norm in norms.values())


class Stage12Partitions(Partitions):
    """ZeRO 1 and 2: every rank holds all bit16 weights, and its slice of masters, optimizer state and gradients.

    ::

        group i       | weight A      | bias B | weight C           | pad |
        bit16         |———— rank 0 ————|———— rank 1 ————|———— rank 2 ————|   on every rank
        fp32 masters  |  A[:m]         |                |                |   on rank 0, and so on
        gradients     |  A[:m]         |                |                |   on rank 0 (stage 1 keeps the others too)

    A rank may own parts of two parameters and all of none, or nothing but padding.

    Communication beyond the second backward's: one all-gather of the bit16 weights on the way to θ'. The way back is the
    gather that ends the engine's step. After an exception the slices are gathered over a gloo group of their own, where
    ranks meet that failed at different places: the usual group is not usable any more once a collective timed out in it.
    """

    def __init__(self, zero: Any) -> None:
        fragments = []
        for group, owned in enumerate(zero.params_in_partition):
            rank = dist.get_rank(zero.real_dp_process_group[group])
            for parameter in owned:
                key = zero.get_param_id(parameter)
                start = int(zero.grad_partition_insertion_offset[group][rank][key])
                skipped = int(zero.grad_start_offset[group][rank][key])
                size = min(parameter.numel() - skipped, int(zero.partition_size[group]) - start)
                if size > 0:
                    fragments.append(Fragment(parameter, group, group, start, size))
        super().__init__(zero, fragments)
        self.offloaded = bool(zero.cpu_offload)
        self._kept: dict[int, Any] = {}
        self._rescuers = dist.new_group(backend="gloo", timeout=RESCUE_TIMEOUT)

    @property
    def parameters(self) -> list[list[nn.Parameter]]:
        """Those that DeepSpeed has flattened into ``bit16_groups_flat``."""
        return [list(group) for group in self.zero.bit16_groups]

    def gradients(self) -> list[Tensor]:
        """Views of ``averaged_gradients``, or of the masters' ``.grad`` on the CPU."""
        if self.offloaded:
            _await_copies()
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

    def take_gradients(self) -> list[Tensor]:
        """The gradients themselves; copies only of offloaded ones, whose buffers are used again."""
        self.first = self.gradients()
        if self.offloaded:
            self.first = [gradient.clone() for gradient in self.first]
        else:  # the next backward makes new ones
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

    def put_back(self) -> None:
        """What the second pass has accumulated is dropped."""
        self._clear()
        if self.offloaded:
            torch._foreach_copy_(self.gradients(), self.first)
        else:
            self.zero.averaged_gradients.update(self._kept)
        self.gradients_written()

    def release(self) -> None:
        """The lists in which DeepSpeed kept them go too."""
        super().release()
        self._kept = {}

    def restore(self) -> None:
        """One all-gather, of the usual kind."""
        self.zero.update_lp_params()

    def rescue(self) -> None:
        """One all-gather over a group that no collective can have timed out in."""
        for index, whole in enumerate(self.zero.bit16_groups_flat):
            own = self._master(index).to("cpu", whole.dtype)
            slices = [torch.empty_like(own) for _ in range(dist.get_world_size(self._rescuers))]
            dist.all_gather(slices, own, group=self._rescuers)
            whole.copy_(torch.cat(slices))

    def _master(self, index: int) -> Tensor:
        return self.zero.single_partition_of_fp32_groups[index].detach()  # type: ignore[no-any-return]

    def _own(self, index: int) -> Tensor:
        rank = dist.get_rank(self.zero.real_dp_process_group[index])
        return self.zero.parallel_partitioned_bit16_groups[index][rank]  # type: ignore[no-any-return]

    def _writable(self) -> Callable[[int], Tensor]:
        return self._own

    def _spread(self) -> None:
        for index, whole in enumerate(self.zero.bit16_groups_flat):
            group = self.zero.real_dp_process_group[index]
            if dist.get_world_size(group) > 1:
                _all_gather(whole, self._own(index), group=group)


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

    def __init__(self, zero: Any) -> None:
        fragments, rank = [], dist.get_rank(zero.dp_process_group)
        for index, members in enumerate(zero.fp16_groups):
            start = 0
            for parameter in members:
                slice_size = parameter.partition_numel()
                size = min(slice_size, parameter.ds_numel - rank * slice_size)
                if size > 0:
                    fragments.append(Fragment(parameter, zero.sub_group_to_group_id[index], index, start, size))
                start += slice_size
        super().__init__(zero, fragments)
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
            _await_copies()
            masters = self.zero.fp32_partitioned_groups_flat
            return [fragment.of(masters[fragment.index].grad) for fragment in self.fragments]
        held = {
            id(parameter): gradient
            for index, members in enumerate(self.zero.fp16_groups)
            for parameter, gradient in zip(members, self.zero.averaged_gradients[index], strict=True)
        }
        return [held[id(fragment.parameter)].view(-1)[: fragment.size] for fragment in self.fragments]

    def take_gradients(self) -> list[Tensor]:
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

    def put_back(self) -> None:
        """The copies go back into the buffers."""
        self._clear()
        self.zero.averaged_gradients = self._buffers
        torch._foreach_copy_(self.gradients(), self.first)
        self.gradients_written()

    def release(self) -> None:
        """The list of the buffers goes too."""
        super().release()
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


def _await_copies() -> None:
    """Wait for the copies of gradients from an accelerator to the CPU, which DeepSpeed does not wait for itself."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
