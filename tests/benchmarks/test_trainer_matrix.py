"""Every trainer of the installed TRL: with a penalty of nought trained as without, or refused."""

import random
import re
from pathlib import Path

import numpy
import pytest
import torch
import trl
from trainer_kinds import ELSEWHERE, KINDS, NOT_RUN, build_kind, find
from trainers import AT_THETA, OF_MICRO_BATCHES, assert_same, own_figures, penalties, weights

from gradreg_optim import attach

REFUSED = ["PPOTrainer"]
"""Trainers with a loop of their own."""
WHOLE = ["OnlineDPOTrainer", "NashMDTrainer", "XPOTrainer"]
"""Trainers whose whole ``training_step`` is repeated."""


def installed(names):
    """The names as parameters, skipped where the installed TRL has no such trainer."""
    reason = f"trl {trl.__version__} has none"
    return pytest.mark.parametrize(
        "name",
        [pytest.param(name, marks=pytest.mark.skipif(find(name) is None, reason=reason)) for name in names],
    )


def trained(name, folder, **arguments):
    random.seed(0)  # GKD decides with Python's numbers whether it generates
    numpy.random.seed(0)
    trainer = build_kind(name, folder, **arguments)
    if name in WHOLE and arguments.get("wrapped"):
        attach(trainer)
    trainer.train()
    return trainer


TRAINED = [name for name in KINDS if name not in REFUSED]


@pytest.mark.parametrize("accumulation", [1, 2])
@installed(TRAINED)
def test_trains(name, accumulation, tmp_path):
    """With the second pass at θ a run is the plain one bit for bit, logs included; with a penalty another."""
    plain, at_theta = (
        trained(name, tmp_path, wrapped=wrapped, gradient_accumulation_steps=accumulation) for wrapped in (None, AT_THETA)
    )
    assert own_figures(at_theta) == own_figures(plain)
    assert_same(weights(at_theta.model), weights(plain.model))
    assert len(penalties(at_theta, "second_pass_time")) == 2  # steps
    if accumulation == 1:  # a penalty takes the same way as the second pass at θ: once is enough
        return
    real = trained(name, tmp_path, wrapped=OF_MICRO_BATCHES, gradient_accumulation_steps=accumulation)
    assert len(penalties(real, "penalty_ratio")) == 2
    assert min(penalties(real, "penalty_ratio")) > 0
    pairs = zip(real.model.parameters(), plain.model.parameters(), strict=True)
    assert any(not torch.equal(*pair) for pair in pairs)


@installed(REFUSED)
@pytest.mark.parametrize("by", ["optimizers", "attach"])
def test_refused(name, by, tmp_path):
    """A trainer that cannot be repeated raises at its first step, in one line, before a weight moves."""
    trainer = build_kind(name, tmp_path, wrapped=OF_MICRO_BATCHES)
    if by == "attach":
        attach(trainer)
    before = weights(trainer.model)
    message = {"optimizers": "without a closure", "attach": "without compute_loss and backward"}[by]
    with pytest.raises(RuntimeError, match=message) as caught:
        trainer.train()
    assert "\n" not in str(caught.value)
    assert_same(weights(trainer.model), before)


@installed(WHOLE)
def test_whole_steps_need_no_attach(name, tmp_path):
    """Given as ``optimizers=`` alone, the wrapper regularizes from the first step."""
    trainer = build_kind(name, tmp_path, wrapped=OF_MICRO_BATCHES)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged
    assert all(entry["grad_reg/strength"] == OF_MICRO_BATCHES["strength"] for entry in logged)


@installed(WHOLE)
def test_whole_steps_generate_and_score_once(name, tmp_path):
    """The second pass asks neither for completions nor for the opinion of judge or reward function."""
    counts = []
    for wrapped in (None, OF_MICRO_BATCHES):
        trainer = build_kind(name, tmp_path, wrapped=wrapped, gradient_accumulation_steps=2)
        if wrapped:
            attach(trainer)
        generations, generate = [], trainer.model.generate
        trainer.model.generate = lambda *args, f=generate, n=generations, **kwargs: n.append(1) or f(*args, **kwargs)
        trainer.train()
        opinions = trainer.judge.judged if getattr(trainer, "judge", None) else trainer.reward_funcs[0].scored
        counts.append((len(generations), opinions))
    assert counts[0] == counts[1]
    assert min(counts[0]) > 0


def test_every_trainer_is_in_the_matrix():
    """What ``import trl`` offers is tested here."""
    offered = {name for name in dir(trl) if name.endswith("Trainer")}
    assert offered - KINDS.keys() == set()


def test_every_experimental_trainer_is_in_the_matrix_or_has_a_reason():
    """So is what the installed version keeps under ``trl.experimental``; classes of one name count once."""
    names = set()
    for path in (Path(trl.__file__).parent / "experimental").rglob("*_trainer.py"):
        names |= set(re.findall(r"^class (\w+Trainer)\(", path.read_text(encoding="utf-8"), re.MULTILINE))
    assert len(names) > 10
    assert names - KINDS.keys() - ELSEWHERE.keys() == {name for name in NOT_RUN if name in names}
