"""Gradients and weights in the partitions of DeepSpeed's ZeRO optimizers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradreg_optim.core import multi_tensor
from gradreg_optim.core.multi_tensor import chunks
from gradreg_optim.core.step import FirstGradient, Gradients, GroupGradients, Scalar


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
    """This rank's gradients, fp32 masters and bit16 weights: a :class:`~gradreg_optim.core.storage.Storage`.

    The weights at θ' are round(master + ε·d), and nothing here writes into the masters. They stay at θ' until the engine's
    step copies the masters, or until something raises: ``is_moved`` says so.

    Communication: each :meth:`sum_over_ranks` is an all_reduce of a few fp32 numbers; on the way to θ' and back, see the
    kinds.
    """

    offloaded: bool

    def __init__(self, engine: Any, fragments: list[Fragment]) -> None:
        self.engine = engine
        self.zero = engine.optimizer
        self.fragments = fragments
        self.first: list[Tensor] = []
        self.is_moved = False
        self.sums_announced = 0
        self._groups: list[GroupGradients | None] = []  # of each fragment; ``None`` if it is not regularized

    # Where DeepSpeed keeps things.

    @property
    @abstractmethod
    def parameters(self) -> list[list[nn.Parameter]]:
        """The model's trainable parameters, by the optimizer's groups."""

    @abstractmethod
    def gradients(self) -> list[Tensor]:
        """The gradient of each fragment, averaged over ranks and micro-batches, where the engine's step will read it."""

    @abstractmethod
    def _take_first(self) -> list[Tensor]:
        """The gradients again, out of the reach of the next backward; the engine is left as after ``zero_grad``."""

    @abstractmethod
    def _clear(self) -> None:
        """Leave the engine as after ``zero_grad``."""

    @abstractmethod
    def _return_first(self) -> None:
        """Make the gradients that were taken the engine's again."""

    def _release(self) -> None:
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

    def named_groups(self) -> list[dict[str, Any]]:
        """Groups of the model's parameters, whose names ``exclude`` is about; the optimizer's own hold flat partitions."""
        return [{"params": parameters} for parameters in self.parameters]

    # The storage of a step.

    @property
    def loss_scale(self) -> float:
        """DeepSpeed's, dynamic or static."""
        return float(self.zero.loss_scale)

    @property
    def overflow_skips_step(self) -> bool:
        """In fp16."""
        return bool(self.engine.fp16_enabled())

    @property
    def devices(self) -> set[torch.device]:
        """The engine's."""
        return {torch.device(self.engine.device)}

    @property
    def has_low_precision(self) -> bool:
        """Whether the engine computes in half precision."""
        is_low = self.engine.fp16_enabled() or self.engine.bfloat16_enabled()
        return bool(is_low) or any(p.dtype.itemsize < torch.float32.itemsize for ps in self.parameters for p in ps)

    def take(self, strengths: Sequence[float], excluded: Sequence[frozenset[int]]) -> FirstGradient:
        """Take this rank's fragments."""
        first = FirstGradient([GroupGradients(strength) for strength in strengths])
        left_out = {id(group[i]) for group, positions in zip(self.parameters, excluded, strict=True) for i in positions}
        self.first = self._take_first()
        self._groups = []
        for fragment, gradient in zip(self.fragments, self.first, strict=True):
            is_regularized = strengths[fragment.group] and id(fragment.parameter) not in left_out
            self._groups.append(first.groups[fragment.group] if is_regularized else None)
            if is_regularized:
                first.groups[fragment.group].g1.append(gradient)
        return first

    def has_gradient(self, first: FirstGradient) -> bool:
        """Yes: a rank that owns nothing has to take part all the same."""
        return True

    @contextmanager
    def moved(self, first: FirstGradient, steps: list[Scalar], *, seed: int | None, measured: bool) -> Iterator[None]:
        """Write θ' into the model's weights on every rank, and leave it there; rounding is to nearest, from the masters."""
        self.is_moved = True
        weights = self._writable()
        unscale = first.clip / self.loss_scale
        for fragment, group, direction in zip(self.fragments, self._groups, self.first, strict=True):
            if group is None:
                continue
            weight, master = fragment.of(weights(fragment.index)), fragment.of(self._master(fragment.index))
            start = multi_tensor.sampled(master).to(weight.dtype)
            for block, origin, along in chunks(weight, master, direction):
                block.copy_(origin + along.to(origin.dtype) * steps[fragment.group])
            if measured:
                end, along = multi_tensor.sampled(weight), multi_tensor.sampled(direction)
                moved, squared = multi_tensor.step_moments([start], [end], [along])
                group.moved_along = group.moved_along.to(moved.device) + moved * unscale
                group.step_squared = group.step_squared.to(squared.device) + squared * unscale**2
        self._spread()
        yield

    def leaves(self, first: FirstGradient) -> tuple[list[Tensor], list[Tensor]]:
        """Partitions cannot be differentiated; ``method="exact"`` is refused when the optimizer is made."""
        raise NotImplementedError

    def last(self, first: FirstGradient) -> Gradients:
        """Views of what the engine's step will read; fragments that are not regularized get g1 back."""
        gradients = self.gradients()
        for group, gradient, g1 in zip(self._groups, gradients, self.first, strict=True):
            if group is None:
                gradient.copy_(g1)
        return self.laid_out(first, gradients)

    def laid_out(self, first: FirstGradient, gradients: list[Tensor]) -> Gradients:
        """Sort fragments by group."""
        pairs = list(zip(self._groups, gradients, strict=True))
        return [[gradient for owner, gradient in pairs if owner is group] for group in first.groups]

    def sum_over_ranks(self, sums: Tensor) -> Tensor:
        """One all_reduce over the data-parallel group."""
        total = sums.to(self.engine.device, torch.float32)
        dist.all_reduce(total, group=self.zero.dp_process_group)
        return total.to("cpu" if self.offloaded else self.engine.device)

    def put_back(self, first: FirstGradient) -> None:
        """g1 is what the engine's step will read; where weights are at θ', that step brings them back."""
        if self.first:
            self._return_first()
            self._release()

    def abandon(self, first: FirstGradient) -> None:
        """Bring the weights back on every rank, then g1."""
        if self.is_moved:
            self.is_moved = False
            self.rescue()
        self.put_back(first)

    def keep(self, first: FirstGradient) -> None:
        """What the engine noted about its gradients has to follow."""
        self._note_written()
        self._release()

    def _note_written(self) -> None:
        if self.offloaded:  # norms and overflow were noted while the gradients went to the CPU
            norms: dict[int, Tensor] = {}
            for fragment, gradient in zip(self.fragments, self.gradients(), strict=True):
                norms[self.zero.get_param_id(fragment.parameter)] = gradient.norm()
            self.zero.norm_for_param_grads = norms
            if hasattr(self.zero, "local_overflow"):
                self.zero.local_overflow = not all(bool(torch.isfinite(norm)) for norm in norms.values())

    # Micro-batches: the engine is told where gradients have to be complete.

    def clear(self) -> None:  # noqa: B027 - there is nothing to override: the engine clears them after its step
        """The engine does: after its step, and when gradients are taken."""

    def require_window(self, micro_batches: int) -> None:
        """A window is as long as the engine says, which divides the loss by its length."""
        needed = self.engine.gradient_accumulation_steps()
        if micro_batches != needed:
            raise RuntimeError(
                f"MicroBatches holds {micro_batches} micro-batches, and the engine accumulates {needed} "
                "(gradient_accumulation_steps), by which it divides the loss. Give it as many."
            )

    def announce(self, *, is_summed: bool) -> None:
        """Set the engine's boundary."""
        self.sums_announced += is_summed
        self.engine.set_gradient_accumulation_boundary(is_summed)

    def take_sum(self) -> list[Tensor]:
        """Copies of the gradients of each fragment; the engine is left as after ``zero_grad``."""
        taken = self.copy_sum()
        self._clear()
        return taken

    def copy_sum(self) -> list[Tensor]:
        """Copies of the gradients of each fragment."""
        return [gradient.clone() for gradient in self.gradients()]

    def add_sum(self, gradients: list[Tensor]) -> None:
        """Add to the engine's gradients."""
        for gradient, addend in zip(self.gradients(), gradients, strict=True):
            gradient.add_(addend)


def await_copies() -> None:
    """Wait for the copies of gradients from an accelerator to the CPU, which DeepSpeed does not wait for itself."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
