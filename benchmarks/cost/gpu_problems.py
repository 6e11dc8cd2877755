"""Small networks, closures and optimizers for the checks of gpu.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradreg_optim import GradRegOptimizer

__all__ = [
    "LOW_AND_FULL",
    "PENALTY",
    "UNCLIPPED",
    "assert_same",
    "closure_of",
    "copies",
    "fused",
    "losses_of_a_step",
    "network",
]

assert_same = partial(torch.testing.assert_close, rtol=0, atol=0)
UNCLIPPED: dict[str, Any] = {"g1_clip": None, "g2_clip": None, "check_every": 0}
PENALTY = {"strength": 0.125, "eps": 0.25, **UNCLIPPED}
LOW_AND_FULL = (torch.bfloat16, torch.float32)


def closure_of(optimizer: Any, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The usual closure; ``gradients`` keeps what each call left in ``.grad``."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        closure.gradients.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])
        return value

    closure.gradients = []
    return closure


def network(device: torch.device, dtype: torch.dtype, *layers: nn.Module) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A small network with ``layers`` in the middle, and its loss on fixed data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), *layers, nn.Linear(32, 4)).to(device, dtype)
    inputs, targets = torch.randn(16, 8, device=device, dtype=dtype), torch.randn(16, 4, device=device)
    return model, lambda: (model(inputs).float() - targets).square().mean()


def fused(model: nn.Module, **settings: Any) -> GradRegOptimizer:
    return GradRegOptimizer(torch.optim.AdamW(model.parameters(), lr=0.01, fused=True), **settings)


def copies(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def losses_of_a_step(optimizer: GradRegOptimizer, loss: Callable[[], Tensor]) -> Iterator[Tensor]:
    """Take one step by ``passes()``; yields the loss of each pass."""
    for _ in optimizer.passes():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        yield value
    optimizer.step()
