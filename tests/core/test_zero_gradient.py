"""Steps whose gradient is exactly 0, as GRPO's is where all answers of a step are worth the same: nothing moves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gradreg_optim import GradRegOptimizer, MicroBatches

PRECISIONS = {
    "fp32": (torch.float32, None),
    "bf16 autocast": (torch.float32, torch.bfloat16),
    "bf16": (torch.bfloat16, None),
}
SETTINGS = {
    "default": {},
    "eps": {"eps": 0.02},
    "radius": {"radius": 0.03},
    "auto": {"radius": "auto"},
    "central": {"method": "central"},
    "exact": {"method": "exact"},
    "unshrunk": {"shrink": False},
    "bounded": {"max_penalty_ratio": 1.0},
    "clipped": {"g1_clip": 1.0, "g2_clip": 1.0},
    "checked": {"check_every": 1},
    "some": {"fraction": 0.5},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize(("dtype", "autocast"), PRECISIONS.values(), ids=PRECISIONS)
def test_nothing_moves(dtype, autocast, settings):
    """At first and later: weights and radius stay, every figure is finite, and the steps between are regularized."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1)).to(dtype)
    inputs, targets = torch.randn(4, 16, 8), torch.randn(4, 16, 1)
    optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), strength=0.05, **settings)
    for worth in (0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0):

        def backward(number, worth=worth):
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                output = model(inputs[number].to(dtype))
            loss = worth * (output.float() - targets[number]).square().mean() / 4
            loss.backward()
            return loss

        before = [parameter.detach().clone() for parameter in model.parameters()]
        radius = optimizer.param_groups[0]["gradreg_auto_radius"]
        optimizer.step(MicroBatches(backward, range(4)))
        figures = {name: float(value) for name, value in optimizer.metrics.items()}
        assert all(map(math.isfinite, figures.values())), figures
        if worth:
            assert figures["penalty_ratio"] > 0
            assert all(parameter.isfinite().all() for parameter in model.parameters())
        else:
            assert optimizer.param_groups[0]["gradreg_auto_radius"] == radius
            assert all(map(torch.equal, model.parameters(), before))
