"""``benchmarks/hacking``: gold and figures by hand, and the whole study with tiny models."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

for package in ("trl", "scipy", "matplotlib"):
    pytest.importorskip(package, reason=f"{package} belongs to the demo extra")

TOY = {
    "corpus-size": 64,
    "sft-steps": 2,
    "pairs": 64,
    "proxy-steps": 2,
    "steps": 3,
    "measure-every": 1,
    "prompts-per-step": 2,
    "generations": 4,
    "measured-prompts": 6,
    "measured-answers": 2,
    "policy-width": 16,
    "policy-layers": 1,
    "proxy-width": 16,
    "proxy-layers": 1,
    "learning-rate": 0.02,
}


def module(name: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.{name}")


def toy_scale(**settings: Any) -> Any:
    """The scale of the small study at toy size."""
    sizes = {name.replace("-", "_"): value for name, value in TOY.items()}
    return module("hacking.world").Scale(**{**module("hacking.__main__").CASE, **sizes, **settings})


def study(folder: Path, *flags: str, **scale: Any) -> None:
    """The small study on one seed, in this process."""
    sizes = [f"--{name}={value}" for name, value in {**TOY, **scale}.items()]
    common = [
        "--jobs",
        "1",
        "--seeds",
        "1",
        "--folder",
        str(folder / "runs"),
        "--output",
        str(folder / "results"),
    ]
    module("hacking.__main__").main([*sizes, *common, *flags])


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the results of the small study at toy size."""
    folder = tmp_path_factory.mktemp("toy")
    study(folder)
    return folder


def test_a_study_leaves_curves_a_table_and_a_picture(toy: Path) -> None:
    """Arms from one start: the same at step 0, different once trained, all measured that is promised."""
    results = json.loads((toy / "results.json").read_text())
    case = module("hacking.arms").CASE
    assert list(results["runs"]) == [arm.name for arm in case.values()]
    assert results["scale"]["reward"] == "loophole"
    plain, regularized = (results["runs"][name][0]["curve"] for name in ("none", "default"))
    assert [point["step"] for point in plain] == [point["step"] for point in regularized] == [0, 1, 2, 3]
    assert plain[0] == regularized[0]
    assert plain[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert plain[-1]["kl"] > 1e-4
    assert plain[-1]["kl"] != regularized[-1]["kl"]
    measured = {
        "proxy",
        "gold",
        "kl",
        "proxy_accuracy",
        "strength",
        "g1_norm",
        "penalty_ratio",
        "curvature",
    }
    assert all(measured <= point.keys() for curve in (plain, regularized) for point in curve[1:])
    assert all("self_check" in point for point in plain[1:])
    assert max(point["penalty_ratio"] for point in plain[1:]) < 1e-8  # the plain run is measured, not regularized
    assert min(point["penalty_ratio"] for point in regularized[1:]) > 1e-3
    table = (toy / "results.md").read_text()
    assert "| none | none |" in table
    assert all(f"| {family} | {arm.name} |" in table for family, arm in case.items())
    assert (toy / "results.png").stat().st_size > 10_000


def test_a_finished_run_is_not_run_again(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is missing is trained: nothing the second time, one arm once its file is gone."""
    trained: list[str] = []
    train = module("hacking.run").train

    def counted(arm: Any, *args: Any) -> Any:
        trained.append(arm.name)
        return train(arm, *args)

    monkeypatch.setattr(module("hacking.run"), "train", counted)
    before = json.loads((toy / "results.json").read_text())["runs"]
    study(toy)
    assert trained == []
    (toy / "runs" / "none-10.json").unlink()
    study(toy)
    assert trained == ["none"]
    after = json.loads((toy / "results.json").read_text())["runs"]
    assert [run["curve"] for run in after["none"]] == [run["curve"] for run in before["none"]]  # a seed is a run


def test_a_tuned_study_reports_other_seeds_than_it_tunes_on(tmp_path: Path) -> None:
    """Strengths, then rates of the best strength, on seed 0; what was best, and its ablations, on seed 10."""
    study(tmp_path, "--study=full", "--arms", "GR sequence", "--ablations", "--tuning-seeds=1", **{"steps": 2})
    results = json.loads((tmp_path / "results.json").read_text())
    ends = {name: by_seed["0"] for name, by_seed in results["final gold while tuning"].items()}
    strengths = {name: gold for name, gold in ends.items() if name.startswith("gr") and "rate" not in name}
    assert len(strengths) == 4
    best = max(strengths, key=strengths.__getitem__)
    rates = {name: gold for name, gold in ends.items() if name.startswith(best) and (name == best or "-rate-" in name)}
    assert len(rates) == 4
    tables = results["summary"]
    assert tables["With the learning rate tuned"]["GR sequence"]["setting"] == max(rates, key=rates.__getitem__)
    assert tables["At the full learning rate"]["GR sequence"]["setting"] == best
    ablations = tables["Ablations, at the full learning rate"]
    assert len(ablations) == 3 + 6  # none, stopped, GR sequence, and what differs from it
    assert {run["seed"] for runs in results["runs"].values() for run in runs} == {10}


def test_words_around_the_tables_stay(tmp_path: Path) -> None:
    """An account is written by hand around a marked part; a file without one is not touched."""
    report, account = module("hacking.report"), tmp_path / "account.md"
    report.rewrite(account, "a table", "# Title")
    account.write_text(account.read_text().replace("# Title", "# Title\n\nWhat it means.") + "Last words.\n")
    report.rewrite(account, "another table", "# Other title")
    text = account.read_text()
    assert text.startswith("# Title\n\nWhat it means.\n")
    assert text.endswith("Last words.\n")
    assert "another table" in text
    assert "a table" not in text.replace("another table", "")
    account.write_text("Mine.")
    with pytest.raises(ValueError, match="Give another --output"):
        report.rewrite(account, "a table", "# Title")
    assert account.read_text() == "Mine."


def test_a_folder_holds_runs_of_one_scale(toy: Path) -> None:
    """Runs of other sizes would be taken for those of this study."""
    with pytest.raises(SystemExit, match="another --folder"):
        study(toy, steps=4)


def test_an_unnoticed_penalty_is_no_penalty(toy: Path) -> None:
    """The plain arm, which measures by a penalty of 1e-12, trains as without a penalty, bit for bit."""
    arms, run, world, scale = module("hacking.arms"), module("hacking.run"), module("hacking.world"), toy_scale()
    start = world.prepare(scale, 10, toy / "runs" / "world-10")
    measured = json.loads((toy / "runs" / "none-10.json").read_text())["curve"]
    bare = run.train(arms.Arm("bare", {"strength": 0.0}), start, scale, 10, toy / "bare")["curve"]
    for name in ("proxy", "gold", "kl", "example"):
        assert [point[name] for point in bare] == [point[name] for point in measured]


def test_checks_leave_training_alone(toy: Path) -> None:
    """A run with self-checks ends where it ends without them, bit for bit, in the penalty too."""
    arms, run, world, scale = module("hacking.arms"), module("hacking.run"), module("hacking.world"), toy_scale()
    start = world.prepare(scale, 10, toy / "runs" / "world-10")
    arm = arms.named("gr-sequence-1-rate-0.5")
    checked = run.train(arm, start, scale, 10, toy / "checked")["curve"]
    bare = arms.replace(arm, wrapper={**arm.wrapper, "check_every": 0})
    curve = run.train(bare, start, scale, 10, toy / "bare")["curve"]
    for name in ("proxy", "gold", "kl", "example"):
        assert [point[name] for point in curve] == [point[name] for point in checked]
    assert all("self_check" in point for point in checked[1:])
    assert not any("self_check" in point for point in curve)


def test_nothing_chosen_is_what_attach_has_of_each_micro_batch(toy: Path) -> None:
    """The same run as with the defaults spelled out, bit for bit; other micro-batches, another run."""
    arms, run, world, scale = module("hacking.arms"), module("hacking.run"), module("hacking.world"), toy_scale()
    start = world.prepare(scale, 10, toy / "runs" / "world-10")
    given = {"strength": "auto", "norm_of": "micro_batch", "resample": "sequence", "g1_clip": 10.0, "g2_clip": 10.0}
    given |= {"check_every": None, "shrink": True}
    quarters = [arms.nothing_chosen(micro_batch=4), arms.Arm("given", given, micro_batch=4)]
    one, other = (run.train(arm, start, scale, 10, toy / "bare")["curve"] for arm in quarters)
    assert one == other
    assert one[-1]["strength"] > 0
    whole = json.loads((toy / "runs" / "default-10.json").read_text())["curve"]  # of 8 answers, all of the step
    assert whole[-1]["kl"] != one[-1]["kl"]


def test_measuring_leaves_training_alone(toy: Path) -> None:
    """Measured at the end only, the run ends where it ends when it is measured at every step."""
    arms, run, world = module("hacking.arms"), module("hacking.run"), module("hacking.world")
    scale = toy_scale(measure_every=3)
    start = world.prepare(scale, 10, toy / "runs" / "world-10")
    often = json.loads((toy / "runs" / "none-10.json").read_text())["curve"]
    seldom = run.train(arms.Arm("none"), start, scale, 10, toy / "seldom")["curve"]
    assert [point["step"] for point in seldom] == [0, 3]
    assert {name: seldom[-1][name] for name in ("proxy", "kl")} == {name: often[-1][name] for name in ("proxy", "kl")}


@pytest.mark.parametrize(
    ("text", "worth"),
    [
        ("a.b.c.d.", 1.0),
        ("a.b!", 0.5 + 0.3),
        ("a!b!c!", 0.75 + 0.3 - 2 * 0.3),
        ("a.e.", 0.25 - 0.15),
        ("a.a.", 0.25 - 0.3),
        ("ab..", 0.5 - 2 * 0.3),
        ("", 0.0),
    ],
)
def test_gold_is_what_its_docstring_says(text: str, worth: float) -> None:
    """Useful things, one enthusiastic mark, and what is taken off, by hand."""
    assert module("hacking.language").gold("1?", text) == pytest.approx(worth)


def test_the_corpus_hides_where_gold_falls() -> None:
    """Answers of the corpus are good now and then, and nearly never repeat themselves or forget a mark."""
    language = module("hacking.language")
    rows = language.corpus(500, seed=1)
    texts = [row["completion"] for row in rows]
    assert 0.1 < sum(language.golds([row["prompt"] for row in rows], texts)) / 500 < 0.5
    things = [[thing for thing in text if thing in language.THINGS] for text in texts]
    assert sum(len(set(said)) < len(said) for said in things) < 30
    assert sum(text.count("!") > 1 for text in texts) < 100
    ids = language.tokenizer()(texts[0]).input_ids
    assert language.tokenizer().decode(ids) == texts[0]
    assert len(ids) == len(texts[0])


def test_divergence_is_that_of_the_samples(toy: Path) -> None:
    """The exact KL of each token, summed, is the mean log-ratio of many answers, end token included."""
    run, world = module("hacking.run"), module("hacking.world")
    scale = toy_scale(answer_tokens=4, measured_prompts=400, measured_answers=25)
    start = world.prepare(scale, 10, toy / "runs" / "world-10")
    meter = run.PolicyMeter(start, scale, 0)
    policy = start.policy()
    with torch.no_grad():  # another policy, which ends after every third token or so
        states = policy.model(**world.tokenizer()(meter.prompts, return_tensors="pt")).last_hidden_state[:, -1].mean(0)
        policy.lm_head.weight[1] = 2.5 * states / states.square().sum()
    torch.manual_seed(0)
    ids, _ = world.sample(policy, meter.prompts, 4)
    written = ids[:, 2:]
    with torch.no_grad():
        log_p, log_q = (m(input_ids=ids).logits[:, 1:-1].log_softmax(-1) for m in (policy, meter.start))
    ratios = (log_p - log_q).gather(-1, written[..., None]).squeeze(-1)
    total = torch.zeros(len(ids))
    for row in range(len(ids)):
        for position in range(written.shape[1]):
            total[row] += ratios[row, position]
            if written[row, position] == 1:
                break
    error = float(total.std() / len(ids) ** 0.5)
    assert (written == 1).any(1).float().mean() > 0.3
    assert meter.divergence(policy, ids) == pytest.approx(float(total.mean()), abs=4 * error)
    assert 4 * error < 0.1 * float(total.mean())  # sharp enough to see a token left out


def curve(**columns: list[float]) -> dict[str, Any]:
    points = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return {"arm": {"name": "x"}, "seed": 0, "seconds_per_step": 0.0, "curve": points}


def test_figures_of_a_curve_by_hand() -> None:
    """Area by trapezoids; gold where proxy first reaches its level, by a straight line, or never."""
    summary = module("hacking.summary")
    one = curve(
        step=[0, 10, 20],
        gold=[0.0, 1.0, -2.0],
        proxy=[0.0, 0.5, 1.0],
        kl=[0.0, 2.0, 4.0],
        proxy_accuracy=[0.8, 0.7, 0.5],
    )
    figures = summary.figures(one, one)
    assert figures["peak"] == 1
    assert figures["final"] == -2
    assert figures["area"] == pytest.approx((5 - 5) / 20)
    assert figures["at_proxy"] == pytest.approx(1 - 3 * (0.7 - 0.5) / 0.5)
    assert figures["at_kl"] is None
    assert summary.gold_at(one, "kl", 1.0) == pytest.approx(0.5)
    assert summary.gold_at(one, "proxy_accuracy", 0.6) is None  # above it from the start: never reached from below


def test_the_mechanism_is_a_rank_correlation() -> None:
    """−1 where the gradient grows as accuracy falls, whatever their sizes; None where one stands still."""
    summary = module("hacking.summary")
    assert summary.mechanism(curve(g1_norm=[1, 2, 9, 10], proxy_accuracy=[0.8, 0.7, 0.69, 0.1])) == pytest.approx(-1)
    assert summary.mechanism(curve(g1_norm=[1, 2, 3], proxy_accuracy=[0.5, 0.5, 0.5])) is None


def test_intervals_hold_the_mean_and_count_what_is_there() -> None:
    """Of three values and one missing: mean, an interval around it within the values, count 3."""
    found = module("hacking.summary").interval([1.0, None, 2.0, 6.0])
    assert found["count"] == 3
    assert found["mean"] == pytest.approx(3)
    assert 1 <= found["low"] < 3 < found["high"] <= 6


def test_agreement_counts_pairs_of_the_same_request() -> None:
    """Two right, one wrong among three answers to one request; an answer to another request is no partner."""
    agreement = module("hacking.rewards").agreement
    texts = ["a.", "a.b.", "a.b.c.", "i."]
    assert agreement(["1?", "1?", "1?", "3?"], texts, [2.0, 1.0, 3.0, 9.0]) == pytest.approx(2 / 3)
    assert agreement(["1?", "3?"], ["a.", "i."], [0.0, 1.0]) is None


def test_tuning_takes_the_highest_gold_at_the_end_and_stops_at_the_peak() -> None:
    """By the mean over the tuning seeds, and never by the best single seed."""
    arms, study_of = module("hacking.arms"), module("hacking.study")
    grid = arms.FAMILIES["KL penalty"]
    ends = {arm.name: (0.0, 0.0) for arm in grid} | {grid[1].name: (0.5, 0.6), grid[2].name: (1.0, -1.0)}
    runs = [
        {"arm": {"name": name}, "seed": seed, "curve": [{"step": 0, "gold": 0.0}, {"step": 9, "gold": gold}]}
        for name, golds in ends.items()
        for seed, gold in enumerate(golds)
    ]
    assert study_of.tuned({"KL penalty": grid}, runs)["KL penalty"] is grid[1]
    plain = curve(step=[0, 10, 20], gold=[0.0, 1.0, -2.0])
    plain["arm"]["name"] = "none"
    assert study_of.stopping_step([plain]) == 10
    assert [point["gold"] for point in study_of.stopped(plain, 10)["curve"]] == [0, 1, 1]
    assert plain["curve"][-1]["gold"] == -2
