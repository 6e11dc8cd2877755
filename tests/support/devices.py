"""For tests that run on a GPU, marked ``cuda``, and in a small form on the CPU, which CI runs."""

import os

import pytest
import torch
from torch import nn

from gradreg_optim import GradRegOptimizer


def why_not() -> str:
    """Why no test can run on a GPU in this process; empty if tests can."""
    if not torch.cuda.is_available():
        return "torch finds no GPU here"
    if os.environ.get("TRITON_INTERPRET") != "0":  # conftest.py loads the interpreter
        return "Triton's interpreter is loaded, which no GPU runs; make gpu sets TRITON_INTERPRET=0"
    return ""


MARKS = [pytest.mark.cuda, pytest.mark.skipif(bool(why_not()), reason=why_not() or "there is a GPU")]


def name_of(value):
    """What a value is called in the name of a test."""
    return getattr(value, "__name__", str(value)).replace("torch.", "")


def on_devices(*names, cpu, cuda):
    """Parametrize a test by ``device`` and ``names``; ``cpu`` and ``cuda`` list the values."""
    cases = [pytest.param("cpu", *case) for case in cpu]
    cases += [pytest.param("cuda", *case, marks=MARKS) for case in cuda]
    return pytest.mark.parametrize(("device", *names), cases, ids=name_of)


every_device = on_devices(cpu=[()], cuda=[()])

UNCLIPPED = {"g1_clip": None, "g2_clip": None, "check_every": 0}
PENALTY = {"strength": 0.125, "eps": 0.25, **UNCLIPPED}
LOW_AND_FULL = (torch.bfloat16, torch.float32)


def network(device, dtype, *layers):
    """A small network with ``layers`` in the middle, the same in each call, and its loss on fixed data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), *layers, nn.Linear(32, 4)).to(device, dtype)
    inputs, targets = torch.randn(16, 8, device=device, dtype=dtype), torch.randn(16, 4, device=device)
    return model, lambda: (model(inputs).float() - targets).square().mean()


def fused(model, **settings):
    return GradRegOptimizer(torch.optim.AdamW(model.parameters(), lr=0.01, fused=True), **settings)
