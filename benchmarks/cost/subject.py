"""What the variants of a step share: the cells of the table, and a model with its AdamW state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.cost.transformer import Transformer, parameter_count

__all__ = ["Cell", "Step", "Subject"]

Step = Callable[[], Any]


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
    """One model, one AdamW state and the same micro-batches for all variants."""

    def __init__(self, cell: Cell, device: torch.device) -> None:
        torch.manual_seed(0)
        sizes = {"layers": cell.layers, "width": cell.width, "length": cell.length}
        model = Transformer(**sizes, vocabulary=cell.vocabulary).to(device, getattr(torch, cell.dtype))
        shape = (cell.accumulation, cell.tokens // cell.length, cell.length)
        self.share(model, torch.randint(cell.vocabulary, shape, device=device))

    def share(self, model: Any, batches: Tensor) -> None:
        """Keep the model, and the batches (micro-batches, sequences, tokens)."""
        self.model, self.device = model, batches.device
        self.parameters = list(model.parameters())
        self._all = self.batches = batches
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
