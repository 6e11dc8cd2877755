"""What the phases of a step ask of DeepSpeed's ZeRO optimizers: fragments of parameters, and where they are kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradreg_optim.finite_difference import Scalar, arrival, pieces, sampled

__all__ = ["Fragment", "Partitions", "await_copies"]


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

    @property
    def loss_scale(self) -> float:
        """The factor that gradients carry."""
        return float(self.zero.loss_scale)

    @abstractmethod
    def gradients(self) -> list[Tensor]:
        """The gradient of each fragment, averaged over ranks and micro-batches, where the engine's step will read it."""

    @abstractmethod
    def take_gradients(self) -> list[Tensor]:
        """The gradients again, out of the reach of the next backward; the engine is left as after ``zero_grad``."""

    def take_again(self) -> list[Tensor]:
        """The gradients of a further pass, likewise; the first ones stay where they are."""
        taken = [gradient.clone() for gradient in self.gradients()]
        self._clear()
        return taken

    @abstractmethod
    def _clear(self) -> None:
        """Leave the engine as after ``zero_grad``."""

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
            start = sampled(master).to(weight.dtype)
            for block, origin, step in pieces(weight, master, direction):
                block.copy_(origin + step.to(origin.dtype) * eps)
            arrived.append(arrival([start], [sampled(weight)], [sampled(direction)]))
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


def await_copies() -> None:
    """Wait for the copies of gradients from an accelerator to the CPU, which DeepSpeed does not wait for itself."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
