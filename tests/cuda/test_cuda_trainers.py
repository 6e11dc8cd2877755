"""SFT, GRPO and DPO of TRL under bf16 autocast on a device."""

from __future__ import annotations

import itertools

import pytest
import torch
from devices import on_devices
from trainers import AT_THETA, assert_same, build, llama, penalties, weights

PENALTY = {"strength": 0.05, "radius": 0.1, "g1_clip": None, "g2_clip": None, "check_every": 0}


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch):
    """Kernels that add in a fixed order, where there are such."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def trained(kind, folder, device, dtype, wrapped):
    model = llama().to(device, dtype)
    trainer = build(kind, folder, model=model, wrapped=wrapped, use_cpu=device == "cpu", bf16=True)
    trainer.train()
    return trainer, weights(trainer.model)


def distance(one, other):
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@on_devices(
    "kind",
    "dtype",
    cpu=[("grpo", torch.bfloat16)],
    cuda=itertools.product(("sft", "grpo", "dpo"), (torch.float32, torch.bfloat16)),
)
@pytest.mark.filterwarnings("ignore")  # what kernels, TRL and Transformers say on a GPU differs with their versions
def test_trains(device, kind, dtype, tmp_path):
    """With the second pass at θ a run is the plain one, bit for bit; with a penalty it is another."""
    _, plain = trained(kind, tmp_path, device, dtype, None)
    _, at_theta = trained(kind, tmp_path, device, dtype, {**AT_THETA, "check_every": 0})
    trainer, regularized = trained(kind, tmp_path, device, dtype, PENALTY)
    if device == "cpu":
        assert_same(at_theta, plain)
    elif distance(at_theta, plain) > 0:  # kernels that add in no fixed order would explain it
        _, again = trained(kind, tmp_path, device, dtype, None)
        assert distance(at_theta, plain) <= 2 * distance(again, plain)
    assert all(weight.isfinite().all() for weight in regularized.values())
    assert distance(regularized, plain) > 0
    ratios = penalties(trainer, "penalty_ratio")
    assert len(ratios) == 3  # steps
    assert min(ratios) > 0
