"""``benchmarks/hacking/kl_and_gr``: equal budgets, what tuning chooses, runs that are kept, differences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="trl belongs to the demo extra")

from test_reward_hacking import TOY, curve, module

SIZES = {name.replace("-", "_"): value for name, value in TOY.items()}


def ended(name: str, seed: int, gold: float, **settings: Any) -> dict[str, Any]:
    """A run that ends with ``gold``."""
    one = curve(step=[0, 120], gold=[0.2, gold], kl=[0.0, 1.0])
    where = {"problem": "learned", "answers": 64, "steps": 120, "stage": "reported"} | settings
    return {**one, **where, "arm": {"name": name}, "seed": seed}


def test_both_sides_have_the_same_budget() -> None:
    """As many settings, the same KL penalties, names that lead back to the side; other seeds."""
    study, tables = module("hacking.kl_and_gr"), module("hacking.kl_and_gr_tables")
    for sides in (*study.SIDES.values(), *study.WIDE_SIDES.values()):
        alone, pair = sides[tables.KL], sides[tables.PAIR]
        assert len(alone) == len(pair)
        assert {arm.trainer["beta"] for arm in alone} == {arm.trainer["beta"] for arm in pair}
        assert all(arm.wrapper["strength"] > 0 and arm.wrapper["resample"] == "sequence" for arm in pair)
        assert all(arm.wrapper == {"strength": 0.0} for arm in alone)
        runs = [(side, ended(arm.name, 0, 0.0)) for side, grid in sides.items() for arm in grid]
        assert len({tables.name(one) for _, one in runs}) == len(runs)
        assert [tables.side(one) for _, one in runs] == [side for side, _ in runs]
    assert not set(study.TUNING_SEEDS) & set(study.REPORTED_SEEDS)


def test_tuning_takes_the_best_of_those_that_were_best_at_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All settings run on one seed and few on the others; the best mean wins; all runs are kept."""
    study = module("hacking.kl_and_gr")
    grid = [study.arm(beta=beta) for beta in (0.1, 0.2, 0.3, 0.4, 0.5)]
    gold = dict(
        zip(
            (arm.name for arm in grid),
            ([1, 0, 0], [0, 9, 9], [0.9, 1, 0.9], [0.8, 0, 1], [0.2, 0, 0]),
            strict=True,
        )
    )
    trained: list[tuple[str, int]] = []

    def train(arm: Any, world: Any, scale: Any, seed: int, *_: Any) -> dict[str, Any]:
        trained.append((arm.name, seed))
        return {**curve(step=[0], gold=[gold[arm.name][seed]]), "arm": {"name": arm.name}, "seed": seed}

    monkeypatch.setattr(study, "train", train)
    monkeypatch.setattr(study, "prepare", lambda *_: None)

    def laboratory() -> Any:
        return study.Laboratory(tmp_path / "result.jsonl", tmp_path / "worlds", module("hacking.world").Scale())

    assert laboratory().tuned("learned", grid) is grid[2]
    kept = {grid[i].name for i in (0, 2)}
    assert trained == [
        *((arm.name, 0) for arm in grid),
        *((arm.name, s) for s in (1, 2) for arm in grid if arm.name in kept),
    ]
    trained.clear()
    assert laboratory().tuned("learned", grid) is grid[2]
    assert trained == []
    assert len((tmp_path / "result.jsonl").read_text().splitlines()) == 5 + 2 * 2
    laboratory().runs("learned", grid[:1], [0], "reported", times=2)  # of another length: another run
    assert trained == [(grid[0].name, 0)]


def test_a_pair_trains_with_both_from_the_policy_of_its_seed(tmp_path: Path) -> None:
    """With GR on top a KL run ends elsewhere, with its penalty logged; all problems share a seed's policy."""
    study, world = module("hacking.kl_and_gr"), module("hacking.world")
    lab = study.Laboratory(tmp_path / "result.jsonl", tmp_path / "worlds", world.Scale(**SIZES))
    arms = [study.arm(beta=0.3), study.arm(beta=0.3, strength=3.0), study.arm(strength=3.0)]
    one, both, other = lab.runs("learned", arms, [0], "reported")
    assert both["curve"][-1]["penalty_ratio"] > 1e-3
    assert len({run["curve"][-1]["kl"] for run in (one, both, other)}) == 3
    assert one["curve"][0]["gold"] == lab.runs("loophole", arms[:1], [0], "reported")[0]["curve"][0]["gold"]
    weights = [
        (tmp_path / "worlds" / f"{problem}-0" / "policy" / "model.safetensors") for problem in ("learned", "loophole")
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    fresh = world.prepare(world.Scale(**SIZES, reward="loophole"), 0, tmp_path / "fresh").folder / "policy"
    assert weights[1].read_bytes() == (fresh / "model.safetensors").read_bytes()


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    """Seeds that lie far apart do not widen the interval of a difference that is the same on each."""
    tables = module("hacking.kl_and_gr_tables")
    pair = "kl-0.3-gr-sequence-1"
    runs = [ended(name, seed, seed + gain) for name, gain in (("kl-0.2", 0.0), (pair, 0.125)) for seed in range(3)]
    runs += [ended("kl-0.2", 0, 0.5, stage="tuning"), ended("kl-0.3", 0, 0.25, stage=tables.SAME_KL)]
    tables.report(runs, tmp_path)
    text = (tmp_path / "result.md").read_text()
    assert f"| KL + GR | {pair} | 3 | 1.125 (0.125 to 2.125) |  |" in text
    assert "| KL | kl-0.2 | 3 | 1.000 (0.000 to 2.000) | +0.125 (0.125 to 0.125) |" in text
    assert "| KL as in KL + GR | kl-0.3 | 1 | 0.250 (0.250 to 0.250) | -0.125 (-0.125 to -0.125) |" in text
    assert "| learned | 64 | 120 | KL | 1 | 1 | kl-0.2 0.500 |" in text
    assert all((tmp_path / name).stat().st_size > 5_000 for name in ("result.png", "readme.png"))
