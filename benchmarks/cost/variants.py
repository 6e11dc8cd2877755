"""What the cost benchmarks measure: cells, the model that all variants step, and one step of each variant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.cost.peers import PEERS, present
from benchmarks.cost.transformer import Transformer, parameter_count
from gradreg_optim import GradRegOptimizer, MicroBatches

__all__ = ["GRADIENTS", "OURS", "PERIODS", "Cell", "Step", "Subject", "variants"]

Step = Callable[[], Any]

OURS: dict[str, dict[str, Any]] = {
    "GradRegOptimizer": {},
    "GradRegOptimizer, every=4": {"every": 4},
    "GradRegOptimizer, fraction=1/4": {"fraction": 0.25},
}
"""The rows of GradRegOptimizer, with its settings."""
PERIODS = {"GradRegOptimizer, every=4": 4} | {name: peer.period for name, peer in PEERS.items()}
GRADIENTS = {"base": 1.0, "GradRegOptimizer, every=4": 1.25, "GradRegOptimizer, fraction=1/4": 1.25, "LookSAM, k=4": 1.25}
"""The mean number of gradients in a step; 2 for the variants that are not listed."""


@dataclass(frozen=True)
class Cell:
    """One cell of the table: a model, a micro-batch of ``tokens``, a dtype and an accumulation."""

    layers: int
    width: int
    vocabulary: int
    tokens: int
    length: int
    dtype: str
    accumulation: int

    @property
    def parameters(self) -> int:
        return parameter_count(layers=self.layers, width=self.width, vocabulary=self.vocabulary)

    @property
    def name(self) -> str:
        size = self.parameters / 1e6
        return f"{size:.{0 if size >= 1 else 2}f} M {self.dtype} x{self.accumulation}"


class Subject:
    """What all variants share: one model, one AdamW state and the same micro-batches."""

    def __init__(self, cell: Cell, device: torch.device, *, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = Transformer(layers=cell.layers, width=cell.width, length=cell.length, vocabulary=cell.vocabulary)
        self.model.to(device, getattr(torch, cell.dtype))
        self.parameters = list(self.model.parameters())
        shape = (cell.accumulation, cell.tokens // cell.length, cell.length)
        self._all = self.batches = torch.randint(cell.vocabulary, shape, device=device)
        self._state: Any = None
        self.gradients = 0.0

    def adamw(self, parameters: Any, **settings: Any) -> torch.optim.AdamW:
        """An AdamW on ``parameters`` that has its own groups and shares the state of all others made here."""
        optimizer = torch.optim.AdamW(parameters, **{"lr": 1e-5, **settings})
        self._state = optimizer.state = optimizer.state if self._state is None else self._state
        return optimizer

    def closure(self) -> Tensor:
        """Clear the gradients, then forward and backward over all micro-batches."""
        self.model.zero_grad()
        with torch.enable_grad():
            for tokens in self.batches:
                loss = self.backward(tokens)
        return loss

    def backward(self, tokens: Tensor) -> Tensor:
        """Forward and backward of one micro-batch; counts it in ``gradients``."""
        self.gradients += 1 / len(self.batches)
        loss = self.model(tokens) / len(self.batches)
        loss.backward()
        return loss

    def limit(self, micro_batches: int | None = None, *, sequences: int | None = None) -> None:
        """Limit the micro-batches of a step and the sequences of a micro-batch; ``None`` is no limit."""
        self.batches = self._all[:micro_batches, :sequences]


def variants(subject: Subject, cell: Cell, *, peers: bool = True) -> dict[str, Step]:
    """One step of each variant that can run in ``cell``."""
    optimizer = subject.adamw(subject.parameters)
    steps: dict[str, Step] = {
        "base": lambda: (subject.closure(), optimizer.step()),
        "floor": lambda: (subject.closure(), subject.closure(), optimizer.step()),
    }
    for name, settings in OURS.items():
        if settings.get("fraction") and cell.accumulation == 1:
            continue
        steps[name] = _ours(subject, settings)
    for name, peer in present().items() if peers else ():
        steps[name] = peer.build(subject)
    return steps


def _ours(subject: Subject, settings: dict[str, Any]) -> Step:
    wrapper = GradRegOptimizer(subject.adamw(subject.parameters), **settings)
    if "fraction" in settings:
        return lambda: wrapper.step(MicroBatches(subject.backward, subject.batches))
    return lambda: wrapper.step(subject.closure)
