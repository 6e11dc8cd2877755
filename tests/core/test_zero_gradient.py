"""Steps whose gradient is exactly 0, as GRPO's is where all answers of a step are worth the same: nothing moves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gradreg_optim import GradRegOptimizer

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
    "unshrunk": {"shrink": False},
    "bounded": {"max_penalty_ratio": 1.0},
    "clipped": {"g1_clip": 1.0, "g2_clip": 1.0},
    "checked": {"check_every": 1},
}


CASES = [("bf16", name) for name in SETTINGS] + [
    ("fp32", "default"),
    ("fp32", "radius"),
    ("bf16 autocast", "default"),
]


@pytest.mark.parametrize(("precision", "name"), CASES)
def test_nothing_moves(precision, name):
    """At first and later: weights and radius stay, every figure is finite, and the steps between are regularized."""
    (dtype, autocast), settings = PRECISIONS[precision], SETTINGS[name]
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1)).to(dtype)
    inputs, targets = torch.randn(64, 8), torch.randn(64, 1)
    optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), strength=0.05, **settings)
    for worth in (0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0):

        def closure(worth=worth):
            optimizer.zero_grad()
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                output = model(inputs.to(dtype))
            loss = worth * (output.float() - targets).square().mean()
            loss.backward()
            return loss

        before = [parameter.detach().clone() for parameter in model.parameters()]
        radius = optimizer.param_groups[0]["gradreg_auto_radius"]
        optimizer.step(closure)
        figures = {name: float(value) for name, value in optimizer.metrics.items()}
        assert all(map(math.isfinite, figures.values())), figures
        if worth:
            assert figures["penalty_ratio"] > 0
            assert all(parameter.isfinite().all() for parameter in model.parameters())
        else:
            assert optimizer.param_groups[0]["gradreg_auto_radius"] == radius
            assert all(map(torch.equal, model.parameters(), before))
