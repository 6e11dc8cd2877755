"""The cost benchmarks: they run, their counts are right, and the README gets their results."""

from __future__ import annotations

import doctest
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tqdm", reason="the benchmarks come with the extra [demo]")

from benchmarks import pages
from benchmarks.common import results as common_results
from benchmarks.cost import measuring, peers, rounds, step_cost, step_tables, subject, variants


@pytest.fixture(scope="module")
def toy() -> dict[str, Any]:
    """One cell with a tiny model, measured."""
    cell = subject.Cell(2, 64, 64, 32, 16, "float32", 4)
    return step_cost.measure(cell, wanted=["GradReg"], seconds=0.0, device=torch.device("cpu"))


def test_gradients_are_counted(toy: dict[str, Any]) -> None:
    """A step takes the gradients that its row says, whole periods of it."""
    taken = {name: row["gradients"] for name, row in toy["rows"].items()}
    assert taken == {
        "base": 1.0,
        "floor": 2.0,
        "GradRegOptimizer": 2.0,
        "GradRegOptimizer, every=4": 1.25,
    }
    assert toy["rows"]["floor"]["to_floor"] == 1.0
    assert toy["rows"]["base"]["copies_beyond_base"] == 0.0


@pytest.mark.filterwarnings("ignore:Gradient regularization. the self-check")  # in bf16, on random tokens, it is right
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shared_state_is_used_as_it_was(dtype: str) -> None:
    """Every variant moves the shared weights, leaves them finite, and steps AdamW once."""
    cell = subject.Cell(1, 64, 64, 32, 16, dtype, 2)
    shared = subject.Subject(cell, torch.device("cpu"))
    steps = variants.variants(shared)
    parameters, state = shared.parameters, shared.adamw(shared.parameters).state
    for name, step in steps.items():
        before = [parameter.detach().clone() for parameter in parameters]
        count = state[parameters[0]]["step"].item() if state else 0
        step()
        assert all(parameter.isfinite().all() for parameter in parameters), name
        assert any(not torch.equal(*pair) for pair in zip(before, parameters, strict=True)), name
        assert state[parameters[0]]["step"].item() - count == (0 if "HeavyBall" in name else 1), name


def test_a_peer_has_a_row_or_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """By whether its package is installed."""
    away = {"SAM", "WSAM", "LookSAM, k=4"}
    monkeypatch.setattr(peers, "version_of", lambda package: None if package == "pytorch_optimizer" else "1.2")
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

    assert measuring.peak_bytes([step, step], torch.device("cpu")) == [16000, 20000]


def test_kinds_of_steps_count_by_their_share() -> None:
    """One slow step in four: the weighted mean of both medians, not the median, which is the fast one's."""
    assert rounds.over_kinds([2.0, 1.0, 1.0, 1.2], [2, 1, 1, 1])[1] == pytest.approx(1.25)
    assert rounds.over_kinds([3.0, 1.0], [2, 2]) == pytest.approx((1.5, 2.0, 2.5))


def test_a_part_that_is_measured_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless its settings or the commit are others; a tree that is dirty by the results does not count."""
    file = tmp_path / "new" / "result.json"
    monkeypatch.setattr(common_results, "commit", lambda: "one")
    common_results.Record(file).keep("cell", {"settings": {"layers": 2}, "rows": {}})
    record = common_results.Record(file)
    monkeypatch.setattr(common_results, "commit", lambda: "one-dirty")
    assert record.has("cell", {"layers": 2})
    assert not record.has("cell", {"layers": 3})
    assert not record.has("other", {"layers": 2})
    assert not common_results.Record(file, fresh=True).has("cell", {"layers": 2})
    monkeypatch.setattr(common_results, "commit", lambda: "another")
    assert not record.has("cell", {"layers": 2})


def results(folder: Path, toy: dict[str, Any]) -> dict[str, Path]:
    """Files as the three scripts write them."""
    half = json.loads(json.dumps(toy))
    half["settings"]["dtype"] = "bfloat16"
    del half["rows"]["GradRegOptimizer, every=4"]
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
    ratio = rows["GradRegOptimizer, every=4"]["to_floor"] / rows["base"]["to_floor"]
    assert f"| `every=4` | {ratio:.2f} | – |" in text
    assert "1.05 to 1.20 ×" in text
    assert "](../benchmarks/results/2026-01-02-zero-cost/result.md)" in text


def test_readme_without_marks_is_refused() -> None:
    """Rather than written over."""
    for text in ("no marks\n", "<!-- cost -->\nno end\n"):
        with pytest.raises(ValueError, match="must have a line '<!-- cost -->'"):
            common_results.between_marks(text, "cost", "new")


def test_document_names_what_is_left_out(toy: dict[str, Any]) -> None:
    """Every peer without a row has its line."""
    text = step_tables.document(
        {"toy": {"stamp": common_results.stamp(), **toy, "missing": {"WSAM": "it is not installed here"}}}
    )
    assert "- WSAM: it is not installed here." in text
    for name in peers.CANNOT_RUN:
        assert f"- {name}: " in text


MODULES_WITH_EXAMPLES = [
    "benchmarks.common.results",
    "benchmarks.common.tables",
    "benchmarks.cost.rounds",
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
