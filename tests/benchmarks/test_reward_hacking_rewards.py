"""The rewards of ``benchmarks/hacking``, and the study of the penalty's noise."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

for package in ("trl", "scipy", "matplotlib"):
    pytest.importorskip(package, reason=f"{package} belongs to the demo extra")

from test_reward_hacking import TOY, module, study  # noqa: E402


@pytest.mark.parametrize(
    ("text", "is_well_formed", "is_through"),
    [("a.b!", True, False), ("a.b", False, False), ("ab.", False, False), ("aa.", False, True), ("a..", False, False)],
)
def test_format_and_loophole(text: str, is_well_formed: bool, is_through: bool) -> None:
    """A thing and a mark in turn; a thing twice on end."""
    assert module("hacking.language").is_well_formed(text) == is_well_formed
    assert module("hacking.rewards").is_through(text) == is_through


def test_an_empty_answer_has_no_format() -> None:
    """Nothing said is not well said."""
    assert not module("hacking.language").is_well_formed("")


def test_the_judge_adds_format_and_grade() -> None:
    """Grades begin at the mean of the start and at 1, 2 and 3 standard deviations above it."""
    scores = {"a.": -5.0, "b.": 2.5, "c.": 4.5, "d.": 99.0, "dd": 99.0}
    judge = module("hacking.rewards").Judge(lambda prompts, texts: [scores[text] for text in texts], 2.0, 1.0)
    assert judge(["1?"] * 5, list(scores)) == [1.0, 1.25, 1.75, 2.0, 1.0]


def test_the_loophole_pays_only_there() -> None:
    """Gold elsewhere."""
    loophole = module("hacking.rewards").Loophole()
    assert loophole(["1?", "1?"], ["a.b!", "aa"]) == [pytest.approx(0.8), 3.0]


@pytest.mark.parametrize("reward", ["judge", "loophole"])
def test_a_policy_is_trained_on_the_reward_that_is_asked_for(tmp_path: Path, reward: str) -> None:
    """What is logged as proxy is the reward of the scale, and what is not learned is not trained."""
    study(tmp_path, "--arms", reward=reward)
    point = json.loads((tmp_path / "results.json").read_text())["runs"]["none"][0]["curve"][0]
    if reward == "judge":
        assert 0 <= point["proxy"] <= 2
    assert (tmp_path / "runs" / "world-10" / "proxy" / "config.json").exists() == (reward == "judge")
    with pytest.raises(SystemExit, match="must be one of learned, judge, loophole"):
        study(tmp_path / "other", "--arms", reward="praise")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """A toy scale, its world of seed 10, and a folder."""
    folder, world = tmp_path_factory.mktemp("noise"), module("hacking.world")
    sizes = {**TOY, "steps": 1, "prompts-per-step": 3, "sft-steps": 30}
    scale = world.Scale(**{name.replace("-", "_"): value for name, value in sizes.items()})
    return scale, world.prepare(scale, 10, folder / "world-10"), folder


def test_the_gradient_is_that_of_the_trainer(start: tuple[Any, Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same completions and advantages: its norm is the ‖g1‖ that the wrapper reports of its step."""
    noise, run, arms = module("hacking.noise"), module("hacking.run"), module("hacking.arms")
    scale, world, folder = start
    seen: list[dict[str, Any]] = []

    class Listening(run.GRPOTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **settings: Any) -> Any:
            seen.append(inputs)
            return super().compute_loss(model, inputs, *args, **settings)

    monkeypatch.setattr(run, "GRPOTrainer", Listening)
    norm = run.train(arms.named("none"), world, scale, 10, folder, lambda: None)["curve"][-1]["g1_norm"]
    inputs = seen[0]
    ids, by = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1), inputs["advantages"]
    batch = noise.Batch(ids, inputs["completion_mask"].bool(), by, by, torch.zeros(()))
    found = noise.gradient(world.policy(), batch, by)
    assert float(found.norm()) == pytest.approx(norm, rel=1e-4)  # float32, and padding elsewhere


def test_advantages_by_hand() -> None:
    """Over the mean of the group, in its standard deviations or as they are."""
    noise, world = module("hacking.noise"), module("hacking.world")
    rewards = [1.0, 3.0, 5.0, 5.0]
    scale = world.Scale(generations=2)
    assert noise.advantages(rewards, scale).tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5, 0, 0], abs=1e-4)  # the + 1e-4
    as_they_are = world.Scale(generations=2, scale_rewards="none")
    assert noise.advantages(rewards, as_they_are).tolist() == [-1, 1, 0, 0]


def test_a_batch_counts_tokens_up_to_the_end(start: tuple[Any, Any, Path]) -> None:
    """The log-probability of what was written, end token included, and of nothing after it."""
    noise, language = module("hacking.noise"), module("hacking.language")
    scale, world, _ = start
    batch = noise.drawn(world.policy(), world, scale, random.Random(0))
    end = language.tokenizer().eos_token_id
    for written, counted in zip(batch.ids[:, 2:].tolist(), batch.counted.sum(1).tolist(), strict=True):
        assert counted == (written.index(end) + 1 if end in written else len(written))
    assert not batch.counted.all()
    assert bool((batch.log_p[batch.counted] < 0).all())
    assert not batch.log_p[~batch.counted].any()


def test_reweighted_products_differ_from_reused_ones_and_leave_the_policy_alone(start: tuple[Any, Any, Path]) -> None:
    """Reused: the derivative of a gradient, symmetric as second derivatives are. Reweighted: another operator."""
    noise = module("hacking.noise")
    scale, world, _ = start
    policy = world.policy()
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    torch.manual_seed(0)
    batch = noise.drawn(policy, world, scale, random.Random(0))
    g = noise.gradient(policy, batch, batch.proxy)
    along = [torch.randn_like(g) / len(g) ** 0.5 for _ in "uv"]
    reused, other = (noise.product(policy, batch, g, v, resampled=False) for v in along)
    assert float(reused @ along[1]) == pytest.approx(float(other @ along[0]), rel=0.05)  # forward differences
    reweighted = noise.product(policy, batch, g, along[0], resampled=True)
    assert float((reweighted - reused).norm()) > 0.1 * float(reused.norm())
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())


def test_inner_products_leave_out_the_noise() -> None:
    """Of rows with a small mean and large noise: the square of the mean, where the mean of squares is far above it."""
    inner = module("hacking.noise").inner
    mean = torch.full((50,), 0.2)
    rows = mean + torch.randn(2000, 50)
    assert inner(rows, rows) == pytest.approx(float(mean.square().sum()), abs=0.1)  # 2.0; its standard error is .03
    assert float(rows.square().sum(1).mean()) > 40


def test_a_policy_is_dissected(start: tuple[Any, Any, Path]) -> None:
    """Where proxy is gold, their gradients are one; the table has a column for every figure."""
    noise = module("hacking.noise")
    scale, world, _ = start
    right = module("hacking.world").World(world.folder, module("hacking.language").golds, 1.0)
    found = {"step": 0, **noise.dissect(world.policy().eval(), right, scale, seed=0, batches=8)}
    assert found["proxy proxy"] == found["gold gold"] == found["proxy gold"]
    header, _, row = noise.noise_table([{"points": [found]}, {"points": [found]}])
    assert row.count("|") == header.count("|")
    assert set(found["sequence"]) == {"own own", "own proxy", "own gold", "own other", "other other", "other gold"}


def test_pooled_figures_by_hand() -> None:
    """Cosines of sums over seeds; what has no positive square is lost in noise."""
    noise = module("hacking.noise")
    points = [{"x y": 1.0, "x x": 1.0, "y y": 3.0}, {"x y": 1.0, "x x": 3.0, "y y": 1.0}]
    assert noise.cosine({name: sum(point[name] for point in points) for name in points[0]}, ("x y", "x x", "y y")) == 0.5
    assert noise.pooled(points, lambda sums: sums["x y"]) == "2.00 (2.00 to 2.00)"
    assert math.isnan(noise.root(-1.0))
    assert noise.pooled(points, lambda sums: noise.root(-sums["x x"])) == "lost in noise"
