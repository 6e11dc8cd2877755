"""Gradients and weights under DeepSpeed: in the partitions of its ZeRO optimizers, and whole in stage 0."""

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
from torch.optim import Optimizer

from gradreg_optim.core.local import LocalStorage
from gradreg_optim.core.multi_tensor import of_group, shift_, step_moments
from gradreg_optim.core.replicas import WHOLE, Part
from gradreg_optim.core.step import FirstGradient, Gradients, GroupGradients, Scalar

# Of FP16_Optimizer and FP16_UnfusedOptimizer, which train bf16 in stage 0.
PRIVATE_STAGE_0 = ("fp16_groups", "loss_scale", "optimizer")


class WholeGradients(LocalStorage):
    """The storage of one step in stage 0: every rank holds all weights and the averaged gradient.

    θ and θ' are the model's weights. In bf16 DeepSpeed keeps fp32 masters beside them, to which only the
    engine's step writes. Communication: none, since all ranks hold the same averaged gradient and compute the
    same from it.
    """

    is_moved = False  # after a pass the weights are at θ again

    def __init__(self, engine: Any, *, is_first: bool = False, part: Part = WHOLE) -> None:
        self.engine = engine
        self.replicas = [(engine.seq_data_parallel_group, engine.device)]
        super().__init__(self.named_groups(), is_first=is_first, part=part)

    def named_groups(self) -> list[dict[str, Any]]:
        """The model's parameters, as parameter groups. In bf16 the optimizer's own groups hold masters."""
        optimizer = self.engine.optimizer
        if isinstance(optimizer, Optimizer):
            return optimizer.param_groups
        return [{"params": parameters} for parameters in optimizer.fp16_groups]


@dataclass(frozen=True)
class Fragment:
    """The elements of one parameter that this rank owns.

    They are those from ``start`` to ``start + size`` of the flat partition ``index``. ``group`` is the
    optimizer's parameter group. Padding between and behind parameters belongs to no fragment.
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
    """The :class:`~gradreg_optim.core.storage.Storage` of a ZeRO engine: what this rank owns of its tensors.

    The weights at θ' are round(fp32 master + ε·d). No method writes to the masters. The weights stay at θ'
    after :meth:`moved`; ``is_moved`` is true until the engine's step copies the masters into them, or
    :meth:`abandon` does.

    Memory: g1 of this rank's fragments. Communication: one all_reduce of a few float32 numbers for each
    :meth:`sum_over_ranks`. The subclasses state the cost of writing and restoring the weights.
    """

    MASTERS: str  # the name of DeepSpeed's attribute that holds the flat fp32 masters, one a partition

    def __init__(self, engine: Any, fragments: list[Fragment], *, offloaded: bool = False) -> None:
        self.engine, self.zero = engine, engine.optimizer
        self.fragments, self.offloaded = fragments, offloaded  # whether gradients and masters are on the CPU
        self.first: list[Tensor] = []  # g1 of each fragment
        self.is_moved = False
        self.part = WHOLE  # the micro-batch
        self._averaged: dict[int, Any] | None = None  # DeepSpeed's dict of g1; ``None``: g1 is in its place
        self._groups: list[GroupGradients | None] = []  # of each fragment; ``None``: it is not regularized

    # Overridden for each ZeRO optimizer.

    @abstractmethod
    def named_groups(self) -> list[dict[str, Any]]:
        """The model's trainable parameters, as parameter groups. The optimizer's own hold flat partitions."""

    @abstractmethod
    def _gradients_on_device(self) -> list[Tensor]:
        """What :meth:`see_sum` returns without offload."""

    @abstractmethod
    def restore(self) -> None:
        """Copy the masters into the model's weights, as the engine's step does. All ranks must call it."""

    @abstractmethod
    def _writable(self) -> list[Tensor]:
        """Prepare this rank's slice of the weights for writing; returns one flat tensor a partition."""

    @abstractmethod
    def _spread(self) -> None:
        """Make the written weights visible to the model on every rank."""

    def _rescue(self) -> None:
        """:meth:`restore` after an exception, while other ranks may wait in a collective of that pass."""
        self.restore()

    def _detached(self) -> list[Tensor]:
        """The gradients, out of reach of the next backward: copies, because DeepSpeed reuses its buffers."""
        return [gradient.clone() for gradient in self.see_sum()]

    def _clear(self) -> None:
        """Leave the engine as after ``zero_grad``."""
        self.zero.zero_grad()

    def _return_first(self) -> None:
        """Give g1 back to the engine, in place of the gradients of later passes."""
        self._clear()
        if self._averaged:  # in place: DeepSpeed's parameters refer to this dict, too
            self.zero.averaged_gradients.update(self._averaged)
        for gradient, g1 in zip(self.see_sum(), self.first, strict=True):
            gradient.copy_(g1)

    # Common to all ZeRO optimizers.

    def see_sum(self) -> list[Tensor]:
        """Views of the averaged gradient of each fragment, in the buffers that the engine's step reads."""
        if not self.offloaded:
            return self._gradients_on_device()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()  # DeepSpeed does not wait for its copies to the CPU
        masters = getattr(self.zero, self.MASTERS)
        return [fragment.of(masters[fragment.index].grad) for fragment in self.fragments]

    def _masters(self) -> list[Tensor]:
        return [master.detach() for master in getattr(self.zero, self.MASTERS)]

    @property
    def loss_scale(self) -> float:
        """DeepSpeed's loss scale (``BF16_Optimizer`` has none), and the share 1/n of a micro-batch."""
        return float(getattr(self.zero, "loss_scale", 1.0)) / self.part.of

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
        dtypes = (parameter.dtype for group in self.named_groups() for parameter in group["params"])
        is_low = self.engine.fp16_enabled() or self.engine.bfloat16_enabled()
        return bool(is_low) or any(dtype.itemsize < torch.float32.itemsize for dtype in dtypes)

    first_pass_moved = False  # masters are out of its reach

    def check_first_pass(self) -> None:
        """Nothing to do: the engine alone uses the gradients that it has reduced."""
        return

    def take(self, strengths: Sequence[float], excluded: Sequence[frozenset[int]]) -> FirstGradient:
        """Take g1 of this rank's fragments."""
        first = FirstGradient([GroupGradients(strength) for strength in strengths])
        positions = zip(self.named_groups(), excluded, strict=True)
        left_out = {id(group["params"][i]) for group, of_group in positions for i in of_group}
        self._averaged = copy(getattr(self.zero, "averaged_gradients", {}))
        self.first = self.take_sum()
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
        self,
        first: FirstGradient,
        steps: list[Scalar],
        *,
        seed: Any,
        measured: bool,
        signs: int | None = None,
    ) -> Iterator[None]:
        """Write θ' into the weights on every rank and leave it there, rounded to nearest."""
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

    def last(self, first: FirstGradient) -> Gradients:
        """Views of what the engine's step will read; fragments that are not regularized get g1 back."""
        gradients = self.see_sum()
        for group, gradient, g1 in zip(self._groups, gradients, self.first, strict=True):
            if group is None:
                gradient.copy_(g1)
        return self.laid_out(first, gradients)

    def laid_out(self, first: FirstGradient, gradients: list[Tensor]) -> Gradients:
        """Sort the gradients of regularized fragments by group."""
        return [
            [gradient for owner, gradient in zip(self._groups, gradients, strict=True) if owner is group]
            for group in first.groups
        ]

    @property
    def loss_ranks(self) -> int:
        """The ranks of the data-parallel group, each with a loss of its own."""
        return dist.get_world_size(self.zero.dp_process_group)

    def sum_over_ranks(self, sums: Tensor) -> Tensor:
        """Add up ``sums`` over the data-parallel group, in float32, with one all_reduce."""
        total = sums.to(self.engine.device, torch.float32)
        dist.all_reduce(total, group=self.zero.dp_process_group)
        return total.to("cpu" if self.offloaded else self.engine.device)

    def put_back(self, first: FirstGradient) -> None:
        """Give g1 back to the engine, whose step also restores weights that are at θ'."""
        if self._averaged is not None:
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
        self._release()

    def _release(self) -> None:
        """Forget g1, and note norms and the overflow flag of the gradients on which the engine will step."""
        if self.offloaded:  # DeepSpeed noted those of the last pass while it copied gradients to the CPU
            pairs = zip(self.fragments, self.see_sum(), strict=True)
            norms = {self.zero.get_param_id(f.parameter): gradient.norm() for f, gradient in pairs}
            self.zero.norm_for_param_grads = norms
            self.zero.local_overflow = not all(bool(torch.isfinite(norm)) for norm in norms.values())
        self.first, self._averaged, self._groups = [], None, []

    # Micro-batches.

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Keep gradients of earlier micro-batches out of the block's reach; then add those that it leaves."""
        averaged = copy(getattr(self.zero, "averaged_gradients", {}))
        before = self.take_sum()
        if self.is_moved:  # by the last micro-batch
            self.restore()
            self.is_moved = False
        try:
            yield
        except BaseException:
            self.first, self._averaged = before, averaged
            self._return_first()
            self._release()
            raise
        for gradient, sums in zip(self.see_sum(), before, strict=True):
            gradient.add_(sums)
        self._release()

    def sum_over_replicas(self, sums: Tensor) -> Tensor:
        """They are complete: the engine has reduced all gradients."""
        return sums

    def take_sum(self) -> list[Tensor]:
        """Take the gradient of each fragment and clear the engine's."""
        taken = self._detached()
        self._clear()
        return taken
