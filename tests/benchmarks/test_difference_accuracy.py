"""The benchmark of difference schemes: its references against float64, its figures in closed form, and one run of it all."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

for package in ("transformers", "matplotlib"):
    pytest.importorskip(package, reason=f"{package} belongs to the demo extra")

from benchmarks.common import language_models  # noqa: E402
from benchmarks.precision import accuracy_tables, difference_accuracy  # noqa: E402
from benchmarks.precision import difference_schemes as schemes  # noqa: E402

through_optimizer = importlib.import_module("benchmarks.precision.__main__")


@pytest.fixture
def setting():
    """A random model, its masters, and a batch of 80 tokens."""
    model = language_models.random_model()
    masters = schemes.jitter_(model)
    return model, masters, language_models.make_batch(model, "policy", 80, 0)


def test_the_exact_product_is_that_of_float64_differences(setting) -> None:
    model, masters, batch = setting
    g, product = schemes.Passes(model, masters, language_models.ARITHMETICS["fp32"]).exact(batch, rows=2)
    wide = schemes.Passes(model, masters, language_models.Arithmetic(weights=torch.float64, attention="eager"))
    sides = []
    for eps in (1e-5, -1e-5):
        with torch.no_grad():
            for number, (p, d) in enumerate(zip(wide.parameters, g, strict=True)):
                p.copy_(wide.start(number).double() + eps * d.double())
        sides.append(wide.gradient(batch))
    difference = [(a - b) / 2e-5 for a, b in zip(*sides, strict=True)]
    error = sum(float((x.double() - y).square().sum()) for x, y in zip(product, difference, strict=True)) ** 0.5
    assert error / schemes.norm(difference) < 2**-8  # both come back in bf16, half a bit of which is 2⁻⁹ each


def test_a_scale_of_two_to_a_power_changes_no_bit_of_the_difference(setting) -> None:
    """What is measured by radius holds at every gradient scale: bf16 has the same bits at every power of two."""
    model, masters, batch = setting
    passes = schemes.Passes(model, masters, language_models.ARITHMETICS["bf16"])
    random = torch.Generator()
    found = []
    for scale in (1.0, 1 / 64):
        scaled = language_models.Batch(batch.kind, batch.seed, batch.tokens, batch.weights * scale)
        passes.restore()
        g1 = passes.gradient(scaled)
        passes.displace(g1, 0.01 / schemes.norm(g1), "master", random)
        found.append([(a - b) / scale for a, b in zip(passes.gradient(scaled), g1, strict=True)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert any(x.any() for x in found[0])


def test_stochastic_rounding_lands_on_neighbours_and_is_right_on_average() -> None:
    random = torch.Generator().manual_seed(0)
    wanted = torch.tensor([1.0 + 2**-7 * 0.25, -3.0 - 2**-6 * 0.75, 1.5])[:, None].expand(3, 40000).contiguous()
    rounded = schemes.stochastically_rounded_(wanted.clone(), random)
    assert rounded[0].unique().tolist() == [1.0, 1.0 + 2**-7]
    assert rounded[1].unique().tolist() == [-3.0 - 2**-6, -3.0]
    assert rounded[2].unique().tolist() == [1.5]
    share = (rounded[:2] != torch.tensor([[1.0], [-3.0]])).float().mean(1)
    assert share.tolist() == pytest.approx([0.25, 0.75], abs=0.01)  # four standard deviations of 40000 draws are 0.009


def test_figures_of_a_difference_made_of_known_parts() -> None:
    """δ = ε·(2·H·g + 2·n) with n as long as H·g and orthogonal to it and to g: cosine 1/√2, ratio √8, projection 2."""
    g, product, noise = ([torch.tensor(v)] for v in ([3.0, 0, 0, 0], [0.0, 4, 0, 0], [0.0, 0, 4, 0]))
    eps = 0.5
    delta = [eps * (2 * h + 2 * n) for h, n in zip(product, noise, strict=True)]
    row = schemes.Figures(schemes.gram(g, product, g, delta), eps, floor=1.0).row()
    assert row["cosine"] == pytest.approx(0.5**0.5, abs=1e-6)
    assert row["norm_ratio"] == pytest.approx(8**0.5, abs=1e-6)
    assert row["projection"] == pytest.approx(2, abs=1e-6)
    assert row["rel"] == pytest.approx(32**0.5 / 3, abs=1e-6)
    assert row["shrink"] == pytest.approx(1 - 9 / 32, abs=1e-6)
    for weight in schemes.WEIGHTS:
        combined, exact = torch.tensor([3.0, 4 * weight, 4 * weight]), torch.tensor([3.0, 2 * weight, 0])
        assert row[f"combined_{weight}"] == pytest.approx(float(torch.cosine_similarity(combined, exact, 0)), abs=1e-6)
        combined[1:] *= 1 - 9 / 32
        assert row[f"shrunk_{weight}"] == pytest.approx(float(torch.cosine_similarity(combined, exact, 0)), abs=1e-6)


def test_the_threshold_that_separates_is_found() -> None:
    assert accuracy_tables.best_threshold([(0.1, False), (0.4, False), (0.6, True), (0.9, True)]) == (0.6, 1.0)
    assert accuracy_tables.best_threshold([(0.1, False), (0.7, False), (0.6, True), (0.9, True)])[1] == 0.75


def test_a_quick_run_on_the_random_model_writes_everything(tmp_path: Path) -> None:
    """JSON, document and picture; the estimates rank as they must where there is little to round."""
    difference_accuracy.main(["--model", "random", "--quick", "--output", str(tmp_path / "run.1")])

    assert (tmp_path / "run.1.png").read_bytes().startswith(b"\x89PNG")
    assert "policy-gradient batches" in (tmp_path / "run.1.md").read_text(encoding="utf-8")
    report = json.loads((tmp_path / "run.1.json").read_text(encoding="utf-8"))
    rows = {(row["arithmetic"], row["scheme"], row["radius"]): row for row in report["rows"]}
    schemes = {scheme for arithmetic, scheme, _ in rows if arithmetic == "bf16"}
    assert schemes == {"published", "grid", "stochastic", "sparse", "master", "central", "exact"}
    forward, central = rows["fp32", "master", 0.00125], rows["bf16", "central", 0.02]
    assert forward["cosine"] > 0.995  # its error falls with the radius
    assert forward["cosine"] > rows["fp32", "master", 0.04]["cosine"] + 0.1
    assert forward["norm_ratio"] == pytest.approx(1, abs=0.02)  # and so does that of its length
    assert central["cosine"] > rows["bf16", "master", 0.02]["cosine"]
    smallest = min((row for row in report["rows"] if row["scheme"] == "published"), key=lambda row: row["radius"])
    assert smallest["cosine"] < 0.5  # the published step of a gradient of norm 0.05 is rounded away
    assert smallest["fidelity"] < 0.1 < 0.9 < rows["bf16", "master", 0.01]["fidelity"]


def test_precision_through_the_optimizer(tmp_path: Path) -> None:
    """One row a step: the radius that finds itself is near the best of the grid, which the published ε in bf16 is not."""
    options = ["--model", "random", "--batches", "policy-80-0", "--passes", "bf16", "--output", str(tmp_path / "run")]
    through_optimizer.main(options)
    rows = json.loads((tmp_path / "run.json").read_text())["rows"]
    assert [through_optimizer.kind_of(row) for row in rows] == ["auto", "published", "fixed", "fixed", "fixed"]
    [line] = through_optimizer.summary(rows)
    assert line["auto"] > line["best"] - 0.02 > 0.9
    assert line["published"] < line["auto"]
    assert line["combined_10"] > line["g1_alone_10"]
    assert "## bf16" in (tmp_path / "run.md").read_text()
