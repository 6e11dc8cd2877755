"""The regularized step in one process on one device: its formula, in every dtype and with every optimizer."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from devices import LOW_AND_FULL, PENALTY, UNCLIPPED, every_device, fused, network, on_devices
from problems import assert_same, closure_of, weights
from torch import nn
from torch.optim import SGD, Adam, AdamW

from gradreg_optim import GradRegOptimizer

BASES = {
    "SGD, fused": partial(SGD, lr=0.01, momentum=0.9, fused=True),
    "SGD, foreach": partial(SGD, lr=0.01, momentum=0.9, foreach=True),
    "Adam, fused": partial(Adam, lr=0.01, amsgrad=True, fused=True),
    "AdamW, fused": partial(AdamW, lr=0.01, fused=True),
    "AdamW, foreach": partial(AdamW, lr=0.01, foreach=True),
}
ON_GPU = {"AdamW, capturable": partial(AdamW, lr=0.01, capturable=True)}
STEPS = ({"eps": 0.25}, {"radius": 20.0})
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = ((0,), (1,), (3,), (127,), (64, 33), (2**16 + 5,), (129, 257))


@on_devices("base", cpu=[(name,) for name in BASES], cuda=[(name,) for name in BASES | ON_GPU])
def test_closed_form(device, base):
    """On a quadratic, three steps of each optimizer are its steps on Aw + γ·A·Aw."""
    base = (BASES | ON_GPU)[base]
    root = torch.randn(6, 6, dtype=torch.float64, device=device)
    hessian, weight = root @ root.T, nn.Parameter(torch.randn(6, 5, dtype=torch.float64, device=device))
    twin = nn.Parameter(weight.detach().clone())
    optimizer, plain = GradRegOptimizer(base([weight]), **PENALTY), base([twin])
    for _ in range(3):
        optimizer.step(closure_of(optimizer, lambda: 0.5 * (weight * (hessian @ weight)).sum()))
        first = hessian @ twin.detach()
        twin.grad = first + PENALTY["strength"] * hessian @ first
        plain.step()
    torch.testing.assert_close(weight, twin, rtol=0, atol=1e-12 * float(twin.detach().abs().max()))  # float64


@on_devices("dtype", "step", cpu=[(torch.bfloat16, STEPS[1])], cuda=[(d, step) for d in DTYPES for step in STEPS])
def test_formula(device, dtype, step):
    """Awkward shapes (empty, odd, unaligned, transposed) against the formula, written out in float64."""
    given = [torch.randn(shape, device=device).to(dtype) for shape in SHAPES]
    params = [nn.Parameter(x) for x in (*given[:-1], given[-1].T, given[3].repeat(3)[1:200])]
    factors = [torch.rand(w.shape, device=device, dtype=torch.float64) + 0.5 for w in params]
    groups = [{"params": params[:4], "gradreg_strength": 0.25}, {"params": params[4:]}]
    strengths = [0.25] * 4 + [0.125] * (len(params) - 4)
    settings = {"strength": 0.125, "rounding": "nearest", **step, **UNCLIPPED}
    optimizer = GradRegOptimizer(SGD(groups, lr=0.1), **settings)
    before = weights(optimizer)
    for _ in optimizer.passes():
        optimizer.zero_grad()
        losses = (0.5 * (a * w.double().square()).sum() for a, w in zip(factors, params, strict=True))
        sum(losses).backward()
    assert_same(weights(optimizer), before)
    g1 = [(a * w.double()).to(dtype) for a, w in zip(factors, before, strict=True)]
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in g1))
    eps = step.get("eps") or step["radius"] / norm
    for weight, strength, factor, start, first in zip(params, strengths, factors, before, g1, strict=True):
        second = factor * (start.float() + eps * first.float()).to(dtype).double()
        scale, second = strength / eps, second.to(dtype).double()
        expected = first.double() + scale * (second - first.double())
        # The dtype rounds both gradients, the weights at θ' and the result, each by half of its eps at most.
        sizes = first.double().abs() * (1 + scale) + scale * second.abs() + torch.finfo(dtype).smallest_normal
        error = (weight.grad.double() - expected).abs() / (2 * torch.finfo(dtype).eps * sizes)
        assert not error.numel() or float(error.max()) <= 1


@every_device
def test_stochastic_rounding(device):
    """Of bf16 weights moved by an eighth of a spacing an eighth moves; the next step draws others."""
    weight = nn.Parameter(torch.ones(2**20, device=device, dtype=torch.bfloat16))
    optimizer = GradRegOptimizer(SGD([weight], lr=0.0), strength=0.1, eps=2**-10, **UNCLIPPED)
    moved = []
    for _ in range(2):
        for _ in optimizer.passes():
            optimizer.zero_grad()
            weight.sum().backward()
            arrived = weight.detach().clone()
        optimizer.step()
        moved.append(arrived != 1)
        assert_same(arrived[moved[-1]], torch.full_like(arrived[moved[-1]], 1 + 2**-7))
        error = math.sqrt(1 / 8 * 7 / 8 / weight.numel())
        assert float(moved[-1].float().mean()) == pytest.approx(1 / 8, abs=5 * error)  # five standard errors
    assert not torch.equal(*moved)


@on_devices("dtype", cpu=[(d,) for d in LOW_AND_FULL], cuda=[(d,) for d in LOW_AND_FULL])
def test_strength_zero(device, dtype):
    """With strength 0 the wrapper is the wrapped optimizer, bit for bit."""
    model, loss = network(device, dtype)
    other = copy.deepcopy(model)
    optimizer, plain = fused(model, strength=0.0), AdamW(other.parameters(), lr=0.01, fused=True)
    for _ in range(3):
        closure = closure_of(optimizer, loss)
        optimizer.step(closure)
        for parameter, gradient in zip(other.parameters(), closure.gradients[0], strict=True):
            parameter.grad = gradient
        plain.step()
    assert_same(weights(model), weights(other))


@every_device
def test_repeatable(device):
    """Two runs from one start end at the same bits: the order of sums is fixed, random bits are seeded."""
    ends = []
    for _ in range(2):
        torch.manual_seed(0)
        model, loss = network(device, torch.bfloat16, nn.Linear(32, 32))
        optimizer = fused(model, strength=0.1, radius=0.05, check_every=0)
        for _ in range(4):
            optimizer.step(closure_of(optimizer, loss))
        ends.append(weights(model))
    assert_same(*ends)
