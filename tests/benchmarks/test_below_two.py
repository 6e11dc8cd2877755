"""``benchmarks/below_two``: its figures against the optimizer's, and everything except the trainers with tiny models."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from problems import regression
from torch import nn

from gradreg_optim import GradRegOptimizer, MicroBatches
from gradreg_optim.drivers.micro_batches import chosen_part

for package in ("transformers", "matplotlib"):
    pytest.importorskip(package, reason=f"{package} belongs to the demo extra")

COUNT = 8
SETTINGS: dict[str, Any] = {"strength": 0.3, "eps": 1e-3, "g1_clip": None, "g2_clip": None}


def module(name: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.below_two.{name}")


def gradient(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def losses() -> tuple[nn.Module, Any]:
    """A network, and the losses of ``COUNT`` micro-batches."""
    model, _ = regression()
    inputs, targets = torch.randn(COUNT, 5, 4).double(), torch.randn(COUNT, 5, 2).double()
    return model, lambda position: (model(inputs[position]) - targets[position]).square().mean() / COUNT


def test_figures_of_a_part_are_those_of_the_step_with_that_part() -> None:
    """From one window: the cosine and the length of what ``fraction=0.25`` hands to the wrapped optimizer."""
    windows = module("windows")
    model, loss = losses()
    recorder = windows.Recorder(torch.optim.SGD(model.parameters(), lr=0.0), **SETTINGS)

    def closure() -> None:
        recorder.zero_grad()
        for position in range(COUNT):
            loss(position).backward()
            recorder.note_gradient()

    recorder.step(closure)
    whole, window = gradient(model), recorder.windows[0]
    torch.testing.assert_close(window.gradients.sum(0) + 0.3 * window.penalty, whole, rtol=1e-9, atol=1e-12)

    optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), **SETTINGS, fraction=0.25)
    optimizer.step(MicroBatches(lambda position: loss(position).backward(), range(COUNT)))
    found, part = gradient(model), chosen_part(COUNT, 0.25, 0)
    start = next(position for position in part if (position - 1) % COUNT not in part)
    parts = module("parts").part_figures(window, 0.3)["parts"]
    at = parts["fraction"].index(0.25) + start
    cosine, length = float(found @ whole / (found.norm() * whole.norm())), float(found.norm() / whole.norm())
    assert [parts["g, strength"][at], parts["g, strength, length"][at]] == pytest.approx([cosine, length], rel=1e-9)
    assert cosine < 0.9999  # another part would be another figure


def test_a_sketch_keeps_inner_products() -> None:
    """To a thousandth of the lengths, of vectors longer than it is, nearly all of which is in a few elements."""
    draw = torch.Generator().manual_seed(0)
    sketch = module("windows").Sketch()
    a, b = (torch.randn(3 * 2**20 // 2, generator=draw) for _ in range(2))
    b[:100] = 300 * a[:100]
    a[:100] *= 100
    near, far = sketch([a[:1000], a[1000:]]), sketch([b])
    exact = float(a @ b / (a.norm() * b.norm()))
    assert float(near @ far / (near.norm() * far.norm())) == pytest.approx(exact, abs=5e-3)  # five standard deviations
    assert 0.3 < exact < 0.9


def test_the_known_answer_is_one() -> None:
    """The penalised objective is stationary there and not at the minimum of the loss; training with it goes there."""
    training = module("known")
    known = training.Known(0, ratio=0.5)
    slope = torch.func.grad(known.objective)
    assert slope(known.answer).norm() < 1e-12
    assert slope(known.plain).norm() > 1e-3
    assert known.distance(known.plain) == pytest.approx(1.0)
    ends = {}
    for name in ("none", "every=1"):
        settings = training.variants(known.strength)[name]
        ends[name] = known.distance(training.descend(known, settings, base="SGD", steps=300, seed=0)[150:].mean(0))
    assert ends["every=1"] < 0.8 * ends["none"]


def test_what_is_written(tmp_path: Path) -> None:
    """A table for each study that was run, all figures, a picture; and later studies join earlier ones."""
    given = ["--toy", "--folder", str(tmp_path), "--output", str(tmp_path / "out")]
    module("__main__").main([*given, "--studies", "convergence"])
    module("__main__").main([*given, "--studies", "fraction"])
    text, figures = (tmp_path / "out.md").read_text(), json.loads((tmp_path / "out.json").read_text())
    assert list(figures) == ["fraction", "convergence"]
    assert "| 0.25 | 0.50 |" in text
    assert "| every=4, plain, kγ |" in text
    assert {len(column) for column in figures["fraction"]["figures"][0]["parts"].values()} == {4 * 16}
    assert (tmp_path / "out.png").stat().st_size > 10_000
