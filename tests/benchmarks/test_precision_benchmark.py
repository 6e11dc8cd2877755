"""``benchmarks/precision``: its exact product against float64, and one run of it all."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers belongs to the demo extra")

from benchmarks.precision import exact, language_models

through_optimizer = importlib.import_module("benchmarks.precision.__main__")


def test_the_exact_product_is_that_of_float64_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a batch in two micro-batches, to the rounding of float32."""
    model = language_models.random_model()
    weights = exact.jittered(model)
    exact.set_weights_(model, weights, torch.float32)
    batch = language_models.make_batch(model, "policy", 80, 0)
    monkeypatch.setattr(language_models.Batch, "size", 4 * 128)  # so large that micro-batches have two sequences
    gradient, product = exact.exact(model, batch)
    wide = language_models.Arithmetic(weights=torch.float64)
    sides = []
    for eps in (1e-5, -1e-5):
        moved = [w.double() + eps * d.double() for w, d in zip(weights, gradient, strict=True)]
        exact.set_weights_(model, moved, torch.float64)
        language_models.loss(model, batch, wide).backward()
        sides.append([parameter.grad for parameter in model.parameters()])
    difference = [(a - b) / 2e-5 for a, b in zip(*sides, strict=True)]
    error = sum(float((x.double() - y).square().sum()) for x, y in zip(product, difference, strict=True)) ** 0.5
    length = sum(float(y.square().sum()) for y in difference) ** 0.5
    assert error / length < 1e-3  # float32, whose rounding the sharp curvature magnifies


def test_precision_through_the_optimizer(tmp_path: Path) -> None:
    """A row for each step. The radius that finds itself is near the best; the published ε in bf16 is not."""
    options = ["--model", "random", "--batches", "policy-80-0", "--passes", "bf16"]
    through_optimizer.main([*options, "--output", str(tmp_path / "run")])
    rows = json.loads((tmp_path / "run.json").read_text())["rows"]
    assert [through_optimizer.kind_of(row) for row in rows] == [
        "auto",
        "published",
        "fixed",
        "fixed",
        "fixed",
    ]
    [line] = through_optimizer.summary(rows)
    assert line["auto"] > line["best"] - 0.02 > 0.9
    assert line["published"] < line["auto"]
    assert line["combined_10"] > line["g1_alone_10"]
    assert "## bf16" in (tmp_path / "run.md").read_text()
