"""The cost script for a GPU, on a CPU at toy size: all of it runs, and a stopped run continues."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tqdm", reason="the benchmarks come with the extra [demo]")
pytest.importorskip("trl", reason="the benchmarks come with the extra [demo]")

from benchmarks.cost import gpu, rounds
from benchmarks.cost.peers import present
from benchmarks.cost.variants import NAME

CELLS = [f"{arithmetic}, {size}" for arithmetic in ("bf16", "fp32") for size in ("1 × 2k", "1 × 8k", "4 × 8k")]


def test_everything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Every part has its figures, the most important ones first, and the document names the goals."""
    monkeypatch.setattr(rounds, "MAX_ROUNDS", rounds.MIN_ROUNDS)
    given = ["--quick", "--device", "cpu", "--minutes", "60", "--output", str(tmp_path / "result")]
    assert gpu.main(given) == 0
    found = json.loads((tmp_path / "result.json").read_text())
    assert list(found)[:5] == [*CELLS[:3], f"beyond: {NAME}, bf16", "GRPO"]
    assert found.keys() == {*CELLS, *(f"beyond: {name}, {how}" for how, name in gpu.BEYOND), "GRPO"}
    peers = {name for name in gpu.ON_GPU if name in present()}
    assert found["fp32, 1 × 2k"]["rows"].keys() == {"base", "floor", NAME} | peers
    rows, seldom = found["bf16, 4 × 8k"]["rows"], f"{NAME}, every=4"
    assert rows.keys() == {"base", "floor", NAME, gpu.NEAREST, seldom} | peers
    gradients = dict.fromkeys(rows, 2.0) | {"base": 1.0, seldom: 1.25}
    assert {name: row["gradients"] for name, row in rows.items()} == gradients
    assert min(part["launches"] for name, part in found.items() if name.startswith("beyond")) > 0
    assert found["GRPO"]["ratio"] > 0
    document = (tmp_path / "result.md").read_text()
    assert document in capsys.readouterr().out
    for goal in ("≤ 1.01", "≤ 1.04", "≤ 60", "≤ 45", "≤ 0.63"):
        assert f"| {goal} |" in document


def a_run(folder: Path, parts: dict[str, Any], minutes: float, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(gpu, "parts_of", lambda *_: {name: (1, part) for name, part in parts.items()})
    given = ["--quick", "--device", "cpu", "--minutes", str(minutes), "--output", str(folder / "result")]
    return gpu.main(given)


def test_a_run_that_stopped_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured stays. What failed or lacks a package is named, and measured later."""
    done: list[str] = []

    def part(name: str, _seconds: float) -> dict[str, Any]:
        done.append(name)
        return {
            "completions": 1,
            "tokens": 1,
            "seconds": [1.0],
            "regularized": 2.0,
            "plain": 1.0,
            "ratio": 2.0,
        }

    def absent(_seconds: float) -> dict[str, Any]:
        raise ModuleNotFoundError(name="trl")

    good = partial(part, "good")
    assert a_run(tmp_path, {"good": good, "bad": lambda _: {}[0], "absent": absent}, 1, monkeypatch) == 1
    text = (tmp_path / "result.md").read_text()
    assert "- bad: failed: KeyError: ['0']." in text
    assert "- absent: left out: trl is not installed here." in text
    assert a_run(tmp_path, {"good": good, "late": partial(part, "late")}, 0, monkeypatch) == 0
    assert "- late: not measured: the time was up." in (tmp_path / "result.md").read_text()
    assert a_run(tmp_path, {"good": good, "late": partial(part, "late")}, 1, monkeypatch) == 0
    assert done == ["good", "late"]


def test_goals_are_compared_with_figures() -> None:
    """Met, missed, or not measured; a peer's time is a bound where there is a peer."""
    own = {"to_floor": 1.03, "copies_beyond_base": 2.0, "copies_beyond_base_first": 4.0}
    table = gpu.goal_table({"bf16, 1 × 2k": {"rows": {NAME: own, "SAM": {"to_floor": 1.02}}}})
    assert "| × floor, bf16, 1 × 2k tokens | ≤ 1.04 | 1.03 | met |" in table
    assert "| × floor, bf16, 1 × 2k tokens: ahead of the fastest peer | ≤ 1.02 | 1.03 | **missed** |" in table
    assert "| weight copies beyond base, bf16, step of a check | ≤ 3 | 4 | **missed** |" in table
    assert "| launches beyond the passes, bf16 | ≤ 60 | – | not measured |" in table
    assert not any("4 × 8k tokens: ahead" in line for line in table)


def test_the_model_has_the_shape_of_qwen2() -> None:
    """494 M parameters in 290 tensors."""
    model = gpu.make_model(gpu.QWEN2, torch.device("meta"), torch.bfloat16)
    sizes = [parameter.numel() for parameter in model.parameters()]
    assert (sum(sizes), len(sizes)) == (494_032_768, 290)


def test_a_wrong_device_is_refused(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the remedy, before anything runs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, remedy in (([], "--quick --device cpu"), (["--device", "cpu"], "Add --quick")):
        with pytest.raises(SystemExit, match="2"):
            gpu.main(arguments)
        assert remedy in capsys.readouterr().err
