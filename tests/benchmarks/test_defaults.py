"""``benchmarks/hacking/defaults``: what runs, what is kept, what its tables compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="trl belongs to the demo extra")

from test_kl_and_gr import ended
from test_reward_hacking import curve, module


def test_an_aim_is_that_of_the_rule_and_has_runs_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only arms with nothing chosen run again; micro-batches have the same size whatever the answers."""
    study, lab, rule = module("hacking.defaults"), module("hacking.kl_and_gr"), module("hacking.defaults").rule
    trained: list[tuple[Any, ...]] = []

    def train(arm: Any, world: Any, scale: Any, seed: int, *_: Any) -> dict[str, Any]:
        trained.append((arm.name, scale.prompts_per_step * scale.generations, arm.micro_batch, seed, rule.AIM))
        return {**curve(step=[0], gold=[0.5]), "arm": {"name": arm.name}, "seed": seed}

    monkeypatch.setattr(lab, "train", train)
    monkeypatch.setattr(lab, "prepare", lambda *_: None)
    monkeypatch.setattr(rule, "AIM", rule.AIM)
    cells = [("learned", answers, [study.nothing_chosen(beta=0.2), study.kl_alone(0.2)]) for answers in (64, 256)]
    before = rule.AIM
    for aim in (None, None, 0.5):
        study.run(tmp_path / "result.jsonl", tmp_path, cells, [22], aim)
    given = [(name, answers, 64, 22, before) for answers in (64, 256) for name in ("kl-0.2-default", "kl-0.2")]
    assert trained == [*given, *(("kl-0.2-default-aim-0.5", answers, 64, 22, 0.5) for answers in (64, 256))]


def test_a_gain_is_over_the_same_kl_penalty_on_the_same_seed(tmp_path: Path) -> None:
    """And nothing that stands alone has one; γ is that of each seed at the end."""
    study = module("hacking.defaults")
    runs = [ended(name, seed, seed + gain) for name, gain in (("kl-0.2", 0.0), ("kl-0.2-default", 0.125)) for seed in (0, 1)]
    runs += [ended("default", 0, 0.75, problem="loophole"), ended("kl-0.3-default-aim-0.5", 0, 0.5)]
    for one in runs:
        one["curve"][-1]["strength"] = 0.0 if one["arm"]["name"] == "kl-0.2" else 0.25
    study.report(runs, tmp_path)
    text = (tmp_path / "result.md").read_text()
    assert "| kl-0.2-default | 2 | 0.625 (0.125 to 1.125) | 0.125 | 0.12 1.12 | +0.125 (0.125 to 0.125) |" in text
    assert "| 1.0 | 0.25 0.25 |" in text
    assert "| kl-0.2 | 2 | 0.500 (0.000 to 1.000) | 0.000 | 0.00 1.00 |  | 1.0 |  |" in text
    assert "| default | 1 | 0.750 (0.750 to 0.750) | 0.750 | 0.75 |  |" in text
    assert text.index("loophole, 64") < text.index("Learned reward, 64")
