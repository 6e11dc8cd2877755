"""H·g1 by double backward in float32, with which the penalty of the optimizer is compared."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.precision.language_models import ARITHMETICS, Batch, loss

BFLOAT16_STEP = 2.0**-8  # relative size of the last bit of bf16, at its smallest
FP32 = ARITHMETICS["fp32"]


def set_weights_(model: nn.Module, weights: list[Tensor], dtype: torch.dtype) -> None:
    """Give the model copies of ``weights`` in ``dtype``, and no gradients."""
    for parameter, weight in zip(model.parameters(), weights, strict=True):
        parameter.grad = None
        parameter.data = weight.to(dtype, copy=True)


def jittered(model: nn.Module) -> list[Tensor]:
    """The weights, moved off the coarse grid of the file, to values between two bf16 numbers."""
    random = torch.Generator().manual_seed(0)
    factors = (torch.rand(p.shape, generator=random) for p in model.parameters())
    spread = [factor.mul_(2 * BFLOAT16_STEP).add_(1 - BFLOAT16_STEP) for factor in factors]
    return [p.detach() * factor for p, factor in zip(model.parameters(), spread, strict=True)]


def exact(model: nn.Module, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
    """∇L and H·∇L at the model's weights, over micro-batches of 256 tokens, for a small machine."""
    rows = max(1, 256 * len(batch.tokens) // batch.size)
    parts = [slice(first, first + rows) for first in range(0, len(batch.tokens), rows)]
    parameters = list(model.parameters())
    model.zero_grad()
    for part in parts:
        loss(model, batch, FP32, part).backward()
    direction = [parameter.grad for parameter in parameters]
    product = [torch.zeros_like(parameter) for parameter in parameters]
    for part in parts:
        gradients = torch.autograd.grad(loss(model, batch, FP32, part), parameters, create_graph=True)
        torch._foreach_add_(product, torch.autograd.grad(gradients, parameters, direction))
    model.zero_grad()
    return direction, product
