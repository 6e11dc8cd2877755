"""Windows: one step's micro-batches, taken down by the optimizer itself.

From what each micro-batch adds to the gradient in both passes, all parts and all penalties that a later step might use are
computed without training once more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from difference_schemes import ARITHMETICS, MODELS, Batch, loss, make_batch
from torch import Tensor, nn

from gradreg_optim import GradRegOptimizer

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
    """Vectors of any length as vectors of ``BUCKETS`` sums, with signs drawn at random.

    Inner products are right on average, and one by one to ‖a‖·‖b‖/√BUCKETS, a thousandth. A sample of coordinates would
    be much worse: a thousandth of the elements of a gradient holds most of its length.
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
    """How gradients of that model are kept."""
    return Sketch() if model_name == "smollm2" else flat


@dataclass
class Window:
    """The gradients of a step's micro-batches at θ, how much they change up to θ', a row each, and ε."""

    gradients: Tensor
    changes: Tensor
    eps: float

    @property
    def penalty(self) -> Tensor:
        """H·g1, of which γ times is added."""
        return self.changes.sum(0) / self.eps


class Recorder(GradRegOptimizer):
    """Keeps the window of every step; ``note`` is called after the backward of each micro-batch."""

    vector: Vector = staticmethod(flat)

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.windows: list[Window] = []
        self._sums: list[Tensor] = []

    def note(self) -> None:
        """Keep the gradient as it stands, of the regularized parameters."""
        regularized = [
            parameter
            for group in self.param_groups
            for position, parameter in enumerate(group["params"])
            if position not in group["gradreg_excluded"] and parameter.requires_grad
        ]
        self._sums.append(self.vector([parameter.grad for parameter in regularized if parameter.grad is not None]))

    def regularize_(self, second_pass: Callable[[], Any], part: Any = None) -> None:
        """The step, and its window."""
        super().regularize_(second_pass, part)
        half, sums = len(self._sums) // 2, torch.stack(self._sums)
        passes = [torch.diff(x, dim=0, prepend=torch.zeros_like(x[:1])) for x in (sums[:half], sums[half:])]
        self.windows.append(Window(passes[0], passes[1] - passes[0], float(self._metrics["eps"])))
        self._sums.clear()


def recorder(model: nn.Module, base: torch.optim.Optimizer, vector: Vector, **settings: Any) -> Recorder:
    """A recorder with the settings of a trainer in float32: embeddings, here the output layer as well, left out."""
    made = Recorder(base, **{"strength": PUBLISHED, "radius": RADIUS, **UNCLIPPED, **settings}, exclude="embed", model=model)
    made.vector = vector
    return made


def step(optimizer: Recorder, model: nn.Module, batch: Batch, rows: int) -> Window:
    """One step on micro-batches of ``rows`` sequences."""
    model.set_attn_implementation("sdpa")

    def closure() -> None:
        optimizer.zero_grad()
        for first in range(0, len(batch.tokens), rows):
            loss(model, batch, ARITHMETICS["fp32"], slice(first, first + rows)).backward()
            optimizer.note()

    optimizer.step(closure)
    return optimizer.windows[-1]


def course(model_name: str, kind: str, size: int, steps: int, rate: float) -> list[Window]:
    """The windows of AdamW, regularized in each step, on new batches of one micro-batch."""
    model = MODELS[model_name]()
    vector = vector_of(model_name)
    optimizer = recorder(model, torch.optim.AdamW(model.parameters(), lr=rate), vector)
    for seed in range(steps):
        batch = make_batch(model, kind, size, seed)
        step(optimizer, model, batch, len(batch.tokens))
    return optimizer.windows


def laboratory(settings: dict[str, Any], accumulation: int, world: Any, scale: Any, seed: int, folder: Path) -> list[Window]:
    """The windows of a run in the laboratory of reward hacking, of its own GRPO batches."""
    from accelerate import Accelerator
    from hacking.arms import Arm
    from hacking.run import train

    made: list[Recorder] = []

    class Recorded(Arm):
        def optimizer(self, *args: Any, **given: Any) -> Recorder:
            made.append(Recorder(*args, **{**given, **self.wrapper}))
            return made[-1]

    backward = Accelerator.backward

    def noted(self: Any, *args: Any, **given: Any) -> None:
        backward(self, *args, **given)
        made[-1].note()

    answers = scale.prompts_per_step * scale.generations
    trainer = {"per_device_train_batch_size": answers // accumulation, "gradient_accumulation_steps": accumulation}
    with mock.patch.object(Accelerator, "backward", noted):
        train(Recorded("recorded", settings, trainer), world, scale, seed, folder, lambda: None)
    return made[-1].windows
