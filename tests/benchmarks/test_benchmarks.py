"""The cost benchmarks: they run, their counts are right, and the README gets their results."""

from __future__ import annotations

import doctest
import importlib
import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tqdm", reason="the benchmarks come with the extra [demo]")

from benchmarks import pages
from benchmarks.common import results as common_results
from benchmarks.cost import measuring, peers, step_cost, step_tables, transformer, variants, zero_bytes, zero_cost


@pytest.fixture
def toy() -> dict[str, Any]:
    """One cell with a tiny model, measured."""
    cell = variants.Cell(2, 64, 64, 32, 16, "float32", 4)
    return step_cost.measure(cell, wanted=["GradReg"], seconds=0.0, device=torch.device("cpu"))


def test_gradients_are_counted(toy: dict[str, Any]) -> None:
    """A step takes the gradients that its row says, whole periods of it."""
    taken = {name: row["gradients"] for name, row in toy["rows"].items()}
    assert taken == {
        "base": 1.0,
        "floor": 2.0,
        "GradRegOptimizer": 2.0,
        "GradRegOptimizer, every=4": 1.25,
        "GradRegOptimizer, fraction=1/4": 1.25,
    }
    assert toy["rows"]["floor"]["to_floor"] == 1.0
    assert toy["rows"]["base"]["copies_beyond_base"] == 0.0


@pytest.mark.filterwarnings("ignore:Gradient regularization. the self-check")  # in bf16, on random tokens, it is right
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shared_state_is_used_as_it_was(dtype: str) -> None:
    """Every variant moves the shared weights, leaves them finite, and steps AdamW once."""
    cell = variants.Cell(1, 64, 64, 32, 16, dtype, 2)
    subject = variants.Subject(cell, torch.device("cpu"))
    steps = variants.variants(subject, cell)
    state = subject.adamw(subject.parameters).state
    for name, step in steps.items():
        before = [parameter.detach().clone() for parameter in subject.parameters]
        count = state[subject.parameters[0]]["step"].item() if state else 0
        step()
        assert all(parameter.isfinite().all() for parameter in subject.parameters), name
        assert any(not torch.equal(old, new) for old, new in zip(before, subject.parameters, strict=True)), name
        assert state[subject.parameters[0]]["step"].item() - count == (0 if "HeavyBall" in name else 1), name


def test_a_peer_has_a_row_or_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """By whether its package is installed."""

    def version(package: str) -> str:
        if package == "pytorch_optimizer":
            raise peers.PackageNotFoundError
        return "1.2"

    monkeypatch.setattr(peers, "version", version)
    away = {"SAM", "WSAM", "LookSAM, k=4"}
    assert peers.missing() == dict.fromkeys(away, "pytorch_optimizer is not installed here")
    assert peers.present().keys() == peers.PEERS.keys() - away
    assert peers.described("Composer SAM") == "Composer SAM (mosaicml 1.2)"


def test_peak_is_the_highest_point() -> None:
    """Peaks are counted from the start of the first step, with what earlier steps have kept."""
    kept: list[torch.Tensor] = []

    def step() -> None:
        scratch = torch.ones(3000)
        kept.append(torch.ones(1000))
        del scratch

    assert measuring.peak_bytes([step, step]) == [16000, 20000]


def test_kinds_of_steps_count_by_their_share() -> None:
    """One slow step in four: the mean of both medians, weighted; not the median, which would be the fast one's."""
    assert step_cost.over_kinds([2.0, 1.0, 1.0, 1.2], [2, 1, 1, 1])[1] == pytest.approx(1.25)
    assert step_cost.over_kinds([3.0, 1.0], [2, 2]) == pytest.approx((1.5, 2.0, 2.5))


def test_a_cell_that_is_measured_is_not_measured_again(toy: dict[str, Any]) -> None:
    """Unless its settings or the commit are others."""
    cell = variants.Cell(2, 64, 64, 32, 16, "float32", 4)
    assert step_cost.is_measured(cell, toy)
    assert not step_cost.is_measured(variants.Cell(2, 64, 64, 64, 16, "float32", 4), toy)
    assert not step_cost.is_measured(cell, {**toy, "stamp": {**toy["stamp"], "commit": "another"}})
    assert not step_cost.is_measured(cell, None)


def results(folder: Path, toy: dict[str, Any]) -> dict[str, Path]:
    """Files as the three scripts write them."""
    half = json.loads(json.dumps(toy))
    half["settings"]["dtype"] = "bfloat16"
    del half["rows"]["GradRegOptimizer, fraction=1/4"]
    found = {
        "step_cost": {"a": toy, "b": half},
        "zero_cost": {"rows": [{"to_floor": 1.051}, {"to_floor": 1.204}]},
        "scale_cost": {},
    }
    files = {name: folder / f"2026-01-02-{name.replace('_', '-')}" / "result.json" for name in found}
    for name, file in files.items():
        file.parent.mkdir()
        file.write_text(json.dumps(found[name]))
    return files


def test_pages_get_the_newest_figures(toy: dict[str, Any], tmp_path: Path) -> None:
    """Between their marks, and nowhere else; a second time changes nothing."""
    results(tmp_path, toy)
    marked = "before\n<!-- cost -->\nold\n<!-- end -->\nafter\n<!-- below-two -->\nkept\n<!-- end -->\n"
    text = pages.written("docs/cost.md", marked, tmp_path)
    assert pages.written("docs/cost.md", text, tmp_path) == text
    assert text.startswith("before\n<!-- cost -->\n")
    assert "\n<!-- end -->\nafter\n<!-- below-two -->\nkept\n" in text  # a part without a result stays
    assert "old" not in text
    rows = toy["rows"]
    ratio = rows["GradRegOptimizer, fraction=1/4"]["to_floor"] / rows["base"]["to_floor"]
    assert f"| `fraction=0.25` | {ratio:.2f} | – |" in text
    assert "1.05 to 1.20 ×" in text
    assert "](../benchmarks/results/2026-01-02-zero-cost/result.md)" in text


def test_readme_without_marks_is_refused() -> None:
    """Rather than written over."""
    for text in ("no marks\n", "<!-- cost -->\nno end\n"):
        with pytest.raises(ValueError, match="must have a line '<!-- cost -->'"):
            common_results.between_marks(text, "cost", "new")


def test_document_names_what_is_left_out(toy: dict[str, Any]) -> None:
    """Every peer without a row has its line."""
    text = step_tables.document({"toy": {**toy, "missing": {"WSAM": "it is not installed here"}}})
    assert "- WSAM: it is not installed here." in text
    for name in peers.CANNOT_RUN:
        assert f"- {name}: " in text


def test_paper_model_of_70_b() -> None:
    """By hand: P = 69.0e9 of bf16 on 64 ranks."""
    total = sum(zero_bytes.LLAMA_70B)
    assert total == 68_976_648_192
    stage2 = zero_bytes.Sharding(zero_bytes.LLAMA_70B, 64, 2)
    stage3 = zero_bytes.Sharding(zero_bytes.LLAMA_70B, 64, 3)
    assert stage2.sent == pytest.approx(2 * total * 63 / 64, rel=1e-6)
    assert stage2.sent / stage2.sent_plain == pytest.approx(1 / 3, rel=1e-6)
    assert stage3.sent == 63 / 64 * 80
    assert sum(stage3.kept(rank) for rank in range(64)) == 2 * total
    assert sum(stage2.kept(rank) for rank in range(64)) == 2 * sum(stage2.sizes)
    assert max(stage2.kept(rank) for rank in range(64)) == stage2.padded // 64 * 2
    assert stage2.kept_plain == pytest.approx(total * (2 + 2 / 64 + 12 / 64))


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is an extra")
def test_paper_model_against_real_ranks() -> None:
    """Bytes kept and gathered on two ranks are those of the formulas, in all stages and both dtypes."""
    args = zero_cost.parse_arguments(["--quick", "--rounds", "1", "--warmup", "3"])
    found = zero_cost.run(args)
    assert found.keys() == {f"{dtype} stage {stage}" for dtype in ("float32", "bfloat16") for stage in (1, 2, 3)}
    with torch.device("meta"):
        model = transformer.Transformer(layers=args.layers, width=args.width, length=2)
    sizes = [parameter.numel() for parameter in model.parameters()]
    generators = torch.get_rng_state().nbytes  # their state is kept as well, whatever the model
    for case, ranks in found.items():
        bytes_each = 4 if "float32" in case else 2
        persistent = ranks[0]["persistent_parameters"]
        sharding = zero_bytes.Sharding(sizes, args.ranks, int(case[-1]), bytes_each, bytes_each, persistent)
        for rank, figures in enumerate(ranks):
            extra = figures["extra_collectives"]
            beside = figures["kept_bytes"] - generators - sharding.kept(rank)
            assert abs(beside) < 64, case  # scalars: metrics of this step come, those of the last one go
            assert extra["all_gather bytes"] == pytest.approx(sharding.gathered, abs=0 if case[-1] != "3" else 64), case
            assert extra["all_reduce bytes"] <= 2 * zero_bytes.SCALARS, case
            assert extra.keys() == {"all_gather bytes", "all_gather calls", "all_reduce bytes", "all_reduce calls"}, case
        assert math.isclose(sharding.sent, (sharding.gathered + 4 * zero_bytes.SCALARS) / 2)


MODULES_WITH_EXAMPLES = [
    "benchmarks.common.results",
    "benchmarks.common.tables",
    "benchmarks.cost.step_cost",
    "benchmarks.pages",
]


@pytest.mark.parametrize("name", MODULES_WITH_EXAMPLES)
def test_examples_in_docstrings_hold(name: str) -> None:
    """Each prints what its docstring says."""
    found = doctest.testmod(importlib.import_module(name))
    assert found.failed == 0
    assert found.attempted > 0


def test_a_machine_without_git_has_a_stamp(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the files, on a machine that is lent for a measurement."""
    monkeypatch.setenv("PATH", "")
    assert common_results.stamp()["commit"] == "unknown"
