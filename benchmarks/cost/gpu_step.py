"""Checks of gpu.py: the regularized step in one process on one device (how they are run: gpu_checks.py)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.cost import gpu_passes
from benchmarks.cost.gpu_checks import Check, expect
from benchmarks.cost.gpu_problems import LOW_AND_FULL, PENALTY, UNCLIPPED, assert_same, closure_of, copies, fused, network
from gradreg_optim import GradRegOptimizer


def closed_form(device: torch.device) -> str:
    """On a quadratic, three steps of each optimizer are its steps on Aw + γ·A·Aw."""
    sgd, adamw = torch.optim.SGD, torch.optim.AdamW
    kinds: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "SGD, fused": partial(sgd, lr=0.01, momentum=0.9, fused=True),
        "SGD, foreach": partial(sgd, lr=0.01, momentum=0.9, foreach=True),
        "Adam, fused": partial(torch.optim.Adam, lr=0.01, amsgrad=True, fused=True),
        "AdamW, fused": partial(adamw, lr=0.01, fused=True),
        "AdamW, foreach": partial(adamw, lr=0.01, foreach=True),
    }
    if device.type == "cuda":
        kinds["AdamW, capturable"] = partial(adamw, lr=0.01, capturable=True)
    worst = 0.0
    for base in kinds.values():
        torch.manual_seed(0)
        root = torch.randn(6, 6, dtype=torch.float64, device=device)
        hessian, weight = root @ root.T, nn.Parameter(torch.randn(6, 5, dtype=torch.float64, device=device))
        twin = nn.Parameter(weight.detach().clone())
        optimizer, plain = GradRegOptimizer(base([weight]), **PENALTY), base([twin])
        for _ in range(3):
            optimizer.step(closure_of(optimizer, lambda h=hessian, w=weight: 0.5 * (w * (h @ w)).sum()))
            first = hessian @ twin.detach()
            twin.grad = first + PENALTY["strength"] * hessian @ first
            plain.step()
        worst = max(worst, float((weight - twin).abs().max() / twin.abs().max()))
    expect(worst < 1e-12, f"a step is off by {worst:.1e} of the weights, in float64")
    return f"{len(kinds)} optimizers, {worst:.0e}"


def formula(device: torch.device) -> str:
    """Every dtype and awkward shape (empty, odd, unaligned, transposed) against the formula, written out in float64."""
    worst = 0.0
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for step in ({"eps": 0.25}, {"radius": 20.0}):
            torch.manual_seed(0)
            given = [torch.randn(shape, device=device) for shape in ((0,), (1,), (3,), (127,), (64, 33), (2**16 + 5,))]
            given = [tensor.to(dtype) for tensor in (*given, torch.randn(129, 257, device=device))]
            weights = [nn.Parameter(tensor) for tensor in (*given[:-1], given[-1].T, given[3].repeat(3)[1:200])]
            factors = [torch.rand(w.shape, device=device, dtype=torch.float64) + 0.5 for w in weights]
            groups = [{"params": weights[:4], "gradreg_strength": 0.25}, {"params": weights[4:]}]
            strengths = [0.25] * 4 + [0.125] * (len(weights) - 4)
            settings = {"strength": 0.125, "rounding": "nearest", **step, **UNCLIPPED}
            optimizer = GradRegOptimizer(torch.optim.SGD(groups, lr=0.1), **settings)
            before = [w.detach().clone() for w in weights]
            for _ in optimizer.passes():
                optimizer.zero_grad()
                sum(0.5 * (a * w.double().square()).sum() for a, w in zip(factors, weights, strict=True)).backward()
            assert_same([w.detach() for w in weights], before)
            g1 = [(a * w.double()).to(dtype) for a, w in zip(factors, before, strict=True)]
            norm = math.sqrt(sum(float(g.double().square().sum()) for g in g1))
            eps = step.get("eps") or step["radius"] / norm
            for weight, strength, factor, start, first in zip(weights, strengths, factors, before, g1, strict=True):
                second = factor * (start.float() + eps * first.float()).to(dtype).double()
                scale, second = strength / eps, second.to(dtype).double()
                expected = first.double() + scale * (second - first.double())
                # The dtype rounds both gradients, the weights at θ' and the result, each by half of its eps at most.
                sizes = first.double().abs() * (1 + scale) + scale * second.abs() + torch.finfo(dtype).smallest_normal
                error = (weight.grad.double() - expected).abs() / (2 * torch.finfo(dtype).eps * sizes)
                worst = max(worst, float(error.max()) if error.numel() else 0.0)
    expect(worst <= 1, f"the combined gradient is {worst:.1f} × as far from the formula as rounding explains")
    return f"3 dtypes, {worst:.2f} of the rounding allowed"


def stochastic_rounding(device: torch.device) -> str:
    """Of bf16 weights moved by an eighth of a spacing an eighth moves, within five standard errors; the draw changes."""
    weight = nn.Parameter(torch.ones(2**20, device=device, dtype=torch.bfloat16))
    optimizer = GradRegOptimizer(torch.optim.SGD([weight], lr=0.0), strength=0.1, eps=2**-10, **UNCLIPPED)
    moved = []
    for _ in range(2):
        for _ in optimizer.passes():
            optimizer.zero_grad()
            weight.sum().backward()
            arrived = weight.detach().clone()
        optimizer.step()
        moved.append(arrived != 1)
        assert_same(arrived[moved[-1]], torch.full_like(arrived[moved[-1]], 1 + 2**-7))
    shares = [float(part.float().mean()) for part in moved]
    error = 5 * math.sqrt(1 / 8 * 7 / 8 / weight.numel())
    expect(all(abs(share - 1 / 8) < error for share in shares), f"{shares} of the weights moved instead of 0.125")
    expect(not torch.equal(*moved), "two steps drew the same random bits")
    return f"{shares[0]:.4f} of 0.125"


def strength_zero(device: torch.device) -> str:
    """With strength 0 the wrapper is the wrapped optimizer, bit for bit."""
    for dtype in LOW_AND_FULL:
        model, loss = network(device, dtype)
        other = copy.deepcopy(model)
        optimizer, plain = fused(model, strength=0.0), torch.optim.AdamW(other.parameters(), lr=0.01, fused=True)
        for _ in range(3):
            closure = closure_of(optimizer, loss)
            optimizer.step(closure)
            for parameter, gradient in zip(other.parameters(), closure.gradients[0], strict=True):
                parameter.grad = gradient
            plain.step()
        assert_same(copies(model), copies(other))
    return "same bits"


def repeatable(device: torch.device) -> str:
    """Two runs from the same start end at the same bits: sums are added in a fixed order, random bits are seeded."""
    ends = []
    for _ in range(2):
        model, loss = network(device, torch.bfloat16, nn.Linear(32, 32))
        optimizer = fused(model, strength=0.1, radius=0.05)
        for _ in range(4):
            optimizer.step(closure_of(optimizer, loss))
        ends.append(copies(model))
    assert_same(*ends)
    return "same bits"


def surroundings(device: torch.device) -> AbstractContextManager[None]:
    """Nothing is needed around these checks."""
    return nullcontext()


CHECKS: dict[str, Check] = {
    "closed form on a quadratic": closed_form,
    "formula in bf16, fp16, fp32": formula,
    "stochastic rounding": stochastic_rounding,
    "strength 0": strength_zero,
    "two runs": repeatable,
    "restored after an error": gpu_passes.after_an_error,
    "restored after an out-of-memory": gpu_passes.out_of_memory,
    "no step waits for the device": gpu_passes.no_waits,
    "dropout replayed": gpu_passes.dropout,
    "GradScaler overflow": gpu_passes.scaler_overflow,
    "torch.compile": gpu_passes.compiled,
}
