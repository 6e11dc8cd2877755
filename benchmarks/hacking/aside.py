"""The second gradient at the usual distance from θ, but in another direction than g1: does the direction matter?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gradreg_optim import GradRegOptimizer
from gradreg_optim.core.local import LocalStorage
from gradreg_optim.core.step import FirstGradient, Gradients, Scalar

__all__ = ["AsideOptimizer"]


class AsideOptimizer(GradRegOptimizer):
    """Takes the second gradient along another direction.

    Args:
        direction: "random", a new one in each step; or "previous", the gradient of the step before. That gradient comes from
            another batch, so E[H·d] = H·∇L. With g1 as the direction, noise that H and d have in common adds to this.
    """

    def __init__(self, direction: str, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.previous: Gradients | None = None
        self._direction = direction

    def storage(self) -> AsideStorage:
        """The parameters and their gradients; moving the weights asks :meth:`aside` for the direction."""
        return AsideStorage(self)

    def aside(self, g1: Gradients) -> Gradients:
        """The direction, as long as g1 and the same at every point of a step."""
        if self._direction == "random":
            draw = torch.Generator().manual_seed(self.step_count)  # of its own, so that training draws the same numbers
            direction = [[torch.randn(x.shape, generator=draw, dtype=x.dtype) for x in group] for group in g1]
        else:
            direction = g1 if self.previous is None else self.previous
        scale = _norm(g1) / (_norm(direction) or 1.0)
        return [[x * scale for x in group] for group in direction]


class AsideStorage(LocalStorage):
    """Moves the weights along the direction of an :class:`AsideOptimizer`, and gives it g1 for the next step."""

    def __init__(self, optimizer: AsideOptimizer) -> None:
        super().__init__(optimizer.param_groups)
        self._optimizer = optimizer

    @contextmanager
    def moved(
        self, first: FirstGradient, steps: list[Scalar], *, seed: int | None, measured: bool, signs: int | None = None
    ) -> Iterator[None]:
        """Inside the block the weights are at θ + step·d."""
        g1 = [group.g1 for group in first.groups]
        _exchange(first, self._optimizer.aside(g1))
        try:
            with super().moved(first, steps, seed=seed, measured=measured, signs=signs):
                yield
        finally:
            _exchange(first, g1)
        if measured:  # the last point of a step
            self._optimizer.previous = [[x.clone() for x in group] for group in g1]


def _exchange(first: FirstGradient, gradients: Gradients) -> None:
    for group, tensors in zip(first.groups, gradients, strict=True):
        group.g1 = tensors


def _norm(gradients: Gradients) -> float:
    return sum(float(x.square().sum()) for group in gradients for x in group) ** 0.5
