"""The benchmark for a GPU, on a CPU at toy size: everything in it runs, and what fails is reported."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tqdm", reason="the benchmarks come with the extra [demo]")
pytest.importorskip("trl", reason="the benchmarks come with the extra [demo]")

from benchmarks.cost import gpu, gpu_checks, gpu_cost, gpu_tables
from benchmarks.cost.peers import present

CPU = torch.device("cpu")
NEEDS_A_GPU = {"restored after an out-of-memory", "no step waits for the device"}
ENGINES = {f"ZeRO {stage}{where}" for stage in (1, 2, 3) for where in ("", ", optimizer on the CPU")}
OURS = "GradRegOptimizer"


@pytest.mark.timeout(600)  # DeepSpeed may have to compile
def test_everything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each check passes or says what it lacks, each cost has its figures, and the document names the goals."""
    status = gpu.main(["--quick", "--device", "cpu", "--output", str(tmp_path / "result")])
    found = json.loads((tmp_path / "result.json").read_text())
    failures = {check["name"]: check["details"] for check in found["checks"] if check["status"] == "failed"}
    assert failures == {}
    assert status == 0
    skipped = {check["name"] for check in found["checks"] if check["status"] == "skipped"}
    assert skipped == NEEDS_A_GPU | (set() if find_spec("deepspeed") else ENGINES)
    assert {check["name"] for check in found["checks"]} > NEEDS_A_GPU | ENGINES | {"FSDP2", "GRPO", "GRPO with generation"}
    cells = found["cells"]
    assert list(cells) == [cell.name for cell in gpu_cost.CELLS]
    peers = {name for name in gpu_cost.ON_GPU if name in present()}
    assert cells["fp32, 1 × 2k"]["rows"].keys() == {"base", "floor", OURS} | peers
    parts = {f"{OURS}, every=4": 1.25, f"{OURS}, fraction=1/4": 1.25}
    rows = cells["bf16, 4 × 8k"]["rows"]
    assert rows.keys() == {"base", "floor", OURS, gpu_cost.NEAREST} | parts.keys() | peers
    assert {name: row["gradients"] for name, row in rows.items()} == dict.fromkeys(rows, 2.0) | {"base": 1.0} | parts
    assert min(row["launches"] for row in found["beyond"].values()) > 0
    assert found["grpo"]["ratio"] > 0
    document = (tmp_path / "result.md").read_text()
    assert document in capsys.readouterr().out
    for goal in ("≤ 1.01", "≤ 1.04", "≤ 60", "≤ 45", "≤ 0.63", "≤ 0.65"):
        assert f"| {goal} |" in document


def test_a_failure_stops_no_other_check() -> None:
    """One check fails and one ends its process: both are reported, and those after them run."""
    seen: list[Any] = []
    outcomes = gpu_checks.run_group("group", "gpu_failing", CPU, seen.append)
    assert seen == outcomes
    assert [(outcome.name, outcome.status, outcome.words) for outcome in outcomes] == [
        ("right", "passed", "cpu"),
        ("wrong", "failed", "AssertionError: a weight / moved"),
        ("crash", "failed", "its process ended"),
        ("absent", "skipped", "a package is not installed here"),
    ]
    assert "in wrong" in outcomes[1].details
    assert "a last word" in outcomes[2].details


def test_a_cost_that_fails_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is in the table, and in the exit status."""
    report = gpu.Report(gpu.parse_arguments(["--quick", "--device", "cpu", "--output", str(tmp_path / "result")]))
    assert report.measure("half", lambda: 0.5) == 0.5
    assert not report.has_failed
    assert report.measure("none", lambda: 1 / 0) is None
    assert report.has_failed
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert "| costs | none | **failed** | ZeroDivisionError: division by zero |" in (tmp_path / "result.md").read_text()


def test_goals_are_compared_with_figures() -> None:
    """Met, missed, or not measured; a peer's time is a bound where there is a peer."""
    rows = {OURS: {"to_floor": 1.03, "copies_beyond_base": 2.0, "copies_beyond_base_first": 4.0}, "SAM": {"to_floor": 1.02}}
    table = gpu_tables.goal_table({"cells": {"bf16, 1 × 2k": {"rows": rows}}, "beyond": {}})
    assert "| × floor, bf16, 1 × 2k tokens | ≤ 1.04 | 1.03 | met |" in table
    assert "| × floor, bf16, 1 × 2k tokens: ahead of the fastest peer | ≤ 1.02 | 1.03 | **missed** |" in table
    assert "| weight copies beyond base, bf16, step of a check | ≤ 3 | 4 | **missed** |" in table
    assert "| launches beyond the passes, bf16 | ≤ 60 | – | not measured |" in table
    assert "4 × 8k tokens: ahead" not in table


def test_the_model_has_the_shape_of_qwen2() -> None:
    """494 M parameters in 290 tensors."""
    model = gpu_cost.make_model(gpu_cost.QWEN2, torch.device("meta"), torch.bfloat16)
    sizes = [parameter.numel() for parameter in model.parameters()]
    assert (sum(sizes), len(sizes)) == (494_032_768, 290)


def test_a_wrong_device_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With the remedy, before anything runs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    for arguments, remedy in (([], "--quick --device cpu"), (["--device", "cpu"], "Add --quick")):
        with pytest.raises(SystemExit, match="2"):
            gpu.main(arguments)
        assert remedy in capsys.readouterr().err
