"""Storage of gradients and weights in the partitions of DeepSpeed's ZeRO optimizers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradreg_optim.core.multi_tensor import of_group, shift_, step_moments
from gradreg_optim.core.step import FirstGradient, Gradients, GroupGradients, Scalar


@dataclass(frozen=True)
class Fragment:
    """The elements of one parameter that this rank owns: ``start`` to ``start + size`` of the flat partition ``index``.

    ``group`` is the optimizer's parameter group. Padding between and behind parameters belongs to no fragment.
    """

    parameter: nn.Parameter
    group: int
    index: int
    start: int
    size: int

    def of(self, partition: Tensor) -> Tensor:
        """A view of this fragment's elements in a tensor that is laid out like the partition."""
        return partition.view(-1).narrow(0, self.start, self.size)


class Partitions(ABC):
    """The :class:`~gradreg_optim.core.storage.Storage` of a DeepSpeed engine: this rank's gradients, masters and weights.

    The weights at θ' are round(fp32 master + ε·d). No method writes to the masters. The weights stay at θ' after
    :meth:`moved`; ``is_moved`` is true until the engine's step copies the masters into them, or :meth:`abandon` does.

    Memory: g1 of this rank's fragments. Communication: one all_reduce of a few float32 numbers for each
    :meth:`sum_over_ranks`. The subclasses state the cost of writing and restoring the weights.
    """

    # Names of DeepSpeed's attributes, which hold, for each partition:
    MASTERS: str  # the flat fp32 masters
    RECORDS: str  # its gradients, or which of them exist

    offloaded = False  # whether gradients and masters are on the CPU

    def __init__(self, engine: Any, fragments: list[Fragment]) -> None:
        self.engine = engine
        self.zero = engine.optimizer
        self.fragments = fragments
        self.first: list[Tensor] = []  # g1 of each fragment
        self.is_moved = False
        self.sums_announced = 0
        self._records: Any = None  # what RECORDS named when g1 was taken; ``None``: g1 is in its place
        self._groups: list[GroupGradients | None] = []  # of each fragment; ``None``: it is not regularized

    # Overridden for each ZeRO optimizer.

    @abstractmethod
    def named_groups(self) -> list[dict[str, Any]]:
        """The model's trainable parameters, as parameter groups. The optimizer's own groups hold flat partitions."""

    @abstractmethod
    def _gradients_on_device(self) -> list[Tensor]:
        """What :meth:`gradients` returns without offload."""

    @abstractmethod
    def restore(self) -> None:
        """Copy the masters into the model's weights, as the engine's step does. All ranks must call it."""

    @abstractmethod
    def _writable(self) -> list[Tensor]:
        """Prepare this rank's slice of the model's weights for writing, and return it as one flat tensor a partition."""

    @abstractmethod
    def _spread(self) -> None:
        """Make the written weights visible to the model on every rank."""

    def _rescue(self) -> None:
        """:meth:`restore` after an exception, when other ranks may still wait in a collective of the second pass."""
        self.restore()

    def _detach_first(self) -> list[Tensor]:
        """g1, where the next backward cannot overwrite it: copies, because DeepSpeed uses its buffers again."""
        return self.copy_sum()

    def _clear(self) -> None:
        """Leave the engine as after ``zero_grad``."""
        self.zero.zero_grad()
        if self.offloaded:
            self.zero.norm_for_param_grads = {}

    def _return_first(self) -> None:
        """Give g1 back to the engine, in place of the gradients of later passes."""
        self._clear()
        records = getattr(self.zero, self.RECORDS)
        for index in range(len(self._records)):  # in place: DeepSpeed refers to this list or dict from parameters too
            records[index] = self._records[index]
        for gradient, g1 in zip(self.gradients(), self.first, strict=True):
            gradient.copy_(g1)
        self._note_norms()

    # Common to all ZeRO optimizers.

    def gradients(self) -> list[Tensor]:
        """Views of the averaged gradient of each fragment, in the buffers that the engine's step reads."""
        if not self.offloaded:
            return self._gradients_on_device()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()  # DeepSpeed does not wait for its copies from the device to the CPU
        masters = getattr(self.zero, self.MASTERS)
        return [fragment.of(masters[fragment.index].grad) for fragment in self.fragments]

    def _masters(self) -> list[Tensor]:
        return [master.detach() for master in getattr(self.zero, self.MASTERS)]

    def _note_norms(self) -> None:
        """Correct the norms and the overflow flag that DeepSpeed recorded while it copied gradients to the CPU."""
        if self.offloaded:
            pairs = zip(self.fragments, self.gradients(), strict=True)
            norms = {self.zero.get_param_id(fragment.parameter): gradient.norm() for fragment, gradient in pairs}
            self.zero.norm_for_param_grads = norms
            if hasattr(self.zero, "local_overflow"):
                self.zero.local_overflow = not all(bool(torch.isfinite(norm)) for norm in norms.values())

    @property
    def loss_scale(self) -> float:
        """DeepSpeed's loss scale, dynamic or static. ``BF16_Optimizer`` has none."""
        return float(getattr(self.zero, "loss_scale", 1.0))

    @property
    def overflow_skips_step(self) -> bool:
        """Whether the engine trains in fp16."""
        return bool(self.engine.fp16_enabled())

    @property
    def devices(self) -> set[torch.device]:
        """The engine's device."""
        return {torch.device(self.engine.device)}

    @property
    def has_low_precision(self) -> bool:
        """Whether the engine computes in half precision."""
        parameters = (parameter for group in self.named_groups() for parameter in group["params"])
        is_low = self.engine.fp16_enabled() or self.engine.bfloat16_enabled()
        return bool(is_low) or any(parameter.dtype.itemsize < torch.float32.itemsize for parameter in parameters)

    def check_first_pass(self) -> None:
        """Nothing to do: the engine alone uses the gradients that it has reduced."""
        return

    def take(self, strengths: Sequence[float], excluded: Sequence[frozenset[int]]) -> FirstGradient:
        """Take g1 of this rank's fragments."""
        first = FirstGradient([GroupGradients(strength) for strength in strengths])
        pairs = zip(self.named_groups(), excluded, strict=True)
        left_out = {id(group["params"][i]) for group, positions in pairs for i in positions}
        self.first = self._detach_first()
        self._records = copy(getattr(self.zero, self.RECORDS))
        self._clear()
        self._groups = []
        for fragment, gradient in zip(self.fragments, self.first, strict=True):
            is_regularized = strengths[fragment.group] and id(fragment.parameter) not in left_out
            self._groups.append(first.groups[fragment.group] if is_regularized else None)
            if is_regularized:
                first.groups[fragment.group].g1.append(gradient)
        return first

    def has_gradient(self, first: FirstGradient) -> bool:
        """Always true: a rank that owns no element still takes part in the collectives."""
        return True

    @contextmanager
    def moved(
        self, first: FirstGradient, steps: list[Scalar], *, seed: int | None, measured: bool, signs: int | None = None
    ) -> Iterator[None]:
        """Write θ' into the model's weights on every rank and leave it there. Rounds to nearest, whatever ``seed`` is."""
        self.is_moved = True
        self._write(first, steps, measured, signs)  # whose temporaries are gone during the pass
        self._spread()
        yield

    def _write(self, first: FirstGradient, steps: list[Scalar], measured: bool, signs: int | None) -> None:
        weights, masters = self._writable(), self._masters()
        for number, (group, step) in enumerate(zip(first.groups, steps, strict=True)):
            own = [f for f, owner in zip(self.fragments, self._groups, strict=True) if owner is group]
            written, start = ([f.of(flat[f.index]) for f in own] for flat in (weights, masters))
            arrived = shift_(written, group.g1, eps=step, start=start, signs=of_group(signs, number))
            if measured and own:
                group.moved_along, group.step_squared = arrived or step_moments(start, written, group.g1)

    def leaves(self, first: FirstGradient) -> tuple[list[Tensor], list[Tensor]]:
        """Not available: ``ZeroGradRegOptimizer`` refuses ``method="exact"``, which alone needs it."""
        raise NotImplementedError

    def last(self, first: FirstGradient) -> Gradients:
        """Views of what the engine's step will read; fragments that are not regularized get g1 back."""
        gradients = self.gradients()
        for group, gradient, g1 in zip(self._groups, gradients, self.first, strict=True):
            if group is None:
                gradient.copy_(g1)
        return self.laid_out(first, gradients)

    def laid_out(self, first: FirstGradient, gradients: list[Tensor]) -> Gradients:
        """Sort the gradients of regularized fragments by group."""
        return [[g for owner, g in zip(self._groups, gradients, strict=True) if owner is group] for group in first.groups]

    def sum_over_ranks(self, sums: Tensor) -> Tensor:
        """Add up ``sums`` over the data-parallel group, in float32, with one all_reduce."""
        total = sums.to(self.engine.device, torch.float32)
        dist.all_reduce(total, group=self.zero.dp_process_group)
        return total.to("cpu" if self.offloaded else self.engine.device)

    def put_back(self, first: FirstGradient) -> None:
        """Give g1 back to the engine, whose step also restores weights that are at θ'."""
        if self._records is not None:
            self._return_first()
            self._release()

    def abandon(self, first: FirstGradient) -> None:
        """Restore the weights on every rank, then give g1 back."""
        if self.is_moved:
            self.is_moved = False
            self._rescue()
        self.put_back(first)

    def keep(self, first: FirstGradient) -> None:
        """Release g1; the combined gradient is in the engine's buffers."""
        self._note_norms()
        self._release()

    def _release(self) -> None:
        self.first, self._records, self._groups = [], None, []

    # Micro-batches.

    def begin_window(self, micro_batches: int) -> None:
        """Raise ``RuntimeError`` unless ``micro_batches`` is the engine's number of accumulation steps."""
        needed = self.engine.gradient_accumulation_steps()
        if micro_batches != needed:
            raise RuntimeError(
                f"MicroBatches holds {micro_batches} micro-batches, but the engine accumulates {needed} and divides the "
                f"loss by that number (gradient_accumulation_steps). Pass {needed} micro-batches."
            )

    def announce(self, *, is_summed: bool) -> None:
        """Set the engine's accumulation boundary, at which it completes gradients over ranks."""
        self.sums_announced += is_summed
        self.engine.set_gradient_accumulation_boundary(is_summed)

    def take_sum(self) -> list[Tensor]:
        """Copy the gradient of each fragment and clear the engine's."""
        taken = self.copy_sum()
        self._clear()
        return taken

    def copy_sum(self) -> list[Tensor]:
        """Copy the gradient of each fragment."""
        return [gradient.clone() for gradient in self.gradients()]

    def add_sum(self, gradients: list[Tensor]) -> None:
        """Add to the gradient of each fragment."""
        for gradient, addend in zip(self.gradients(), gradients, strict=True):
            gradient.add_(addend)
