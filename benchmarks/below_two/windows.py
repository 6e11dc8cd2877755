"""Windows: the gradients of each micro-batch of a step in both passes, recorded by the optimizer.

From a window the figures of every part of the micro-batches can be computed without another training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.common.language_models import ARITHMETICS, Batch, loss
from gradreg_optim import GradRegOptimizer
from gradreg_optim.core.step import Outcome

Vector = Callable[[Sequence[Tensor]], Tensor]

PUBLISHED = 1e-2
"""The published strength for RLHF."""
RADIUS = 0.0025
UNCLIPPED: dict[str, Any] = {"g1_clip": None, "g2_clip": None}
BUCKETS = 2**20


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors as one vector."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


class Sketch:
    """Compresses vectors of any length to ``BUCKETS`` sums of elements with random signs.

    Inner products are unbiased, with a standard error of ‖a‖·‖b‖/√BUCKETS, a thousandth. A sample of coordinates would be
    much less accurate, because a thousandth of the elements of a gradient holds most of its length.
    """

    def __init__(self) -> None:
        self._signs: Tensor | None = None

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        vector = flat(tensors)
        if self._signs is None:
            self._signs = (
                torch.randint(2, vector.shape, generator=torch.Generator().manual_seed(0), dtype=torch.int8) * 2 - 1
            )
        vector.mul_(self._signs)
        return sum((nn.functional.pad(x, (0, BUCKETS - len(x))) for x in vector.split(BUCKETS)), torch.zeros(BUCKETS))


def vector_of(model_name: str) -> Vector:
    """How the gradients of a model are stored: compressed if the model is large."""
    return Sketch() if model_name == "smollm2" else flat


@dataclass
class Window:
    """The gradients of a step's micro-batches at θ and their changes from θ to θ', one row each, and ε."""

    gradients: Tensor
    changes: Tensor
    eps: float

    @property
    def penalty(self) -> Tensor:
        """H·g1; the step adds γ times this."""
        return self.changes.sum(0) / self.eps


class Recorder(GradRegOptimizer):
    """Keeps the window of every step. Call ``note_gradient`` after the backward of each micro-batch."""

    vector: Vector = staticmethod(flat)

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.windows: list[Window] = []
        self._sums: list[Tensor] = []

    def note_gradient(self) -> None:
        """Record the accumulated gradient of the regularized parameters."""
        regularized = [
            parameter
            for group in self.param_groups
            for position, parameter in enumerate(group["params"])
            if position not in group["gradreg_excluded"] and parameter.requires_grad
        ]
        self._sums.append(self.vector([parameter.grad for parameter in regularized if parameter.grad is not None]))

    def note(self, outcome: Outcome) -> None:
        """Keep the window of the step."""
        super().note(outcome)
        if "eps" in outcome.figures:
            half, sums = len(self._sums) // 2, torch.stack(self._sums)
            passes = [torch.diff(x, dim=0, prepend=torch.zeros_like(x[:1])) for x in (sums[:half], sums[half:])]
            self.windows.append(Window(passes[0], passes[1] - passes[0], float(outcome.figures["eps"])))
        self._sums.clear()


def recorder(model: nn.Module, base: torch.optim.Optimizer, vector: Vector, **settings: Any) -> Recorder:
    """A recorder with the settings of a trainer in float32: embeddings are excluded, and with them the tied output layer."""
    made = Recorder(base, **{"strength": PUBLISHED, "radius": RADIUS, **UNCLIPPED, **settings}, exclude="embed", model=model)
    made.vector = vector
    return made


def step(optimizer: Recorder, model: nn.Module, batch: Batch) -> Window:
    """The window of one step in which each sequence is a micro-batch."""
    model.set_attn_implementation("sdpa")

    def closure() -> None:
        optimizer.zero_grad()
        for row in range(len(batch.tokens)):
            loss(model, batch, ARITHMETICS["fp32"], slice(row, row + 1)).backward()
            optimizer.note_gradient()

    optimizer.step(closure)
    return optimizer.windows[-1]


def windows_of_run(
    settings: dict[str, Any], accumulation: int, world: Any, scale: Any, seed: int, folder: Path
) -> list[Window]:
    """The windows of a run of the reward-hacking benchmark, on its own GRPO batches."""
    from accelerate import Accelerator

    from benchmarks.hacking.arms import Arm
    from benchmarks.hacking.run import train

    made: list[Recorder] = []

    class Recorded(Arm):
        def optimizer(self, *args: Any, **given: Any) -> Recorder:
            made.append(Recorder(*args, **{**given, **self.wrapper}))
            return made[-1]

    backward = Accelerator.backward

    def noted(self: Any, *args: Any, **given: Any) -> None:
        backward(self, *args, **given)
        made[-1].note_gradient()

    answers = scale.prompts_per_step * scale.generations
    trainer = {"per_device_train_batch_size": answers // accumulation, "gradient_accumulation_steps": accumulation}
    with mock.patch.object(Accelerator, "backward", noted):
        train(Recorded("recorded", settings, trainer), world, scale, seed, folder, lambda: None)
    return made[-1].windows
