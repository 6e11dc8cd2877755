"""Over the length of a training: warm-up, schedule, logs, checkpoints, interruptions, a second call of train()."""

import math

import pytest
import torch
from torch.optim import SGD
from trainers import (
    AT_THETA,
    OF_MICRO_BATCHES,
    REAL,
    Spy,
    adamw,
    assert_same,
    at_theta,
    build,
    every_kind,
    llama,
    own_figures,
    penalties,
    weights,
)
from transformers import TrainerCallback

from gradreg_optim import GradRegOptimizer, attach, detach

pytestmark = at_theta

PLAIN_STEP = {"strength", "skipped"}
FIGURES = {
    *PLAIN_STEP,
    "g1_norm",
    "g2_norm",
    "g1_clipped",
    "g2_clipped",
    "penalty_ratio",
    "curvature",
    "cosine",
    "perturbation_fidelity",
    "eps",
    "second_pass_time",
    "loss_check",
}


def names(entry):
    return {key.removeprefix("grad_reg/") for key in entry if key.startswith("grad_reg/")}


def given(by):
    """A trainer's arguments, and what to do with it, when the settings come with the optimizer or by attach()."""
    settings = {**OF_MICRO_BATCHES, "warmup_steps": 1, "schedule": "linear"}
    if by == "optimizers":
        return {"wrapped": settings}, lambda trainer: None
    return {"base": None}, lambda trainer: attach(trainer, **settings)


@every_kind
@pytest.mark.parametrize("by", ["optimizers", "attach"])
def test_resumed_training_is_the_uninterrupted_one(kind, by, tmp_path):
    """Resumed inside its schedule, a run ends in the weights, state and log of the uninterrupted one, bit for bit."""
    arguments, attaching = given(by)
    arguments |= {"max_steps": 4, "lr_scheduler_type": "linear", "gradient_accumulation_steps": 2}
    whole = build(kind, tmp_path, save_strategy="steps", save_steps=2, **arguments)
    attaching(whole)
    whole.train()
    resumed = build(kind, tmp_path, model=llama(seed=5), **arguments)
    attaching(resumed)
    spy = Spy(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    again = kind in ("grpo", "rloo")  # whose first loss is found not to be the integral of its gradient
    assert len(spy.losses) == 2 * 2 * 2 + again  # passes, micro-batches, steps: the first two were not run again
    assert_same(weights(resumed.model), weights(whole.model))
    logs = [own_figures(trainer)[:-1] for trainer in (resumed, whole)]  # the last entry sums up one call of train()
    for entry in (*logs[0], *logs[1]):
        entry.pop("num_tokens", None)  # SFT and DPO forget their count of tokens in checkpoints, plain or not
    assert logs[0] == logs[1]
    assert penalties(resumed, "penalty_ratio") == penalties(whole, "penalty_ratio")
    states = [trainer.optimizer.state_dict() for trainer in (resumed, whole)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    for key, state in states[1]["state"].items():
        assert_same(states[0]["state"][key], state)


@pytest.mark.parametrize(
    ("settings", "strengths"),
    [
        ({"schedule": "linear"}, [0.25, 0.5, 0.75, 1.0]),
        ({"schedule": "linear", "warmup_steps": 2}, [0.0, 0.0, 0.5, 1.0]),
        ({"schedule": "linear", "schedule_steps": 2}, [0.5, 1.0, 1.0, 1.0]),
        ({"schedule": "cosine"}, [(1 - math.cos(math.pi * step / 4)) / 2 for step in (1, 2, 3, 4)]),
        ({"schedule": lambda step: step % 2}, [0.0, 1.0, 0.0, 1.0]),
        ({"strength": 0.0}, [0.0] * 4),
    ],
    ids=["linear", "linear after warm-up", "linear with a length", "cosine", "callable", "strength 0"],
)
def test_named_schedules_rise_over_the_training(settings, strengths, tmp_path):
    """A schedule without a length takes the trainer's; steps of strength 0 run no second pass and log what they know."""
    trainer = build("sft", tmp_path, wrapped={**OF_MICRO_BATCHES, **settings}, max_steps=4, gradient_accumulation_steps=2)
    spy = Spy(trainer)
    trainer.train()
    full = settings.get("strength", OF_MICRO_BATCHES["strength"])
    assert penalties(trainer, "strength") == [full * strength for strength in strengths]
    regularized = [strength > 0 for strength in strengths]
    assert len(spy.losses) == 2 * (4 + sum(regularized))
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [names(entry) for entry in steps] == [FIGURES if step else PLAIN_STEP for step in regularized]


def test_figures_are_averaged_between_logs(tmp_path):
    """Every second step logs the mean over two steps, and how many were skipped in all; evaluation logs nothing of it."""
    logs = {}
    for every in (1, 2):
        arguments = {"logging_steps": every, "max_steps": 4}
        trainer = build("sft", tmp_path, wrapped={**OF_MICRO_BATCHES, "schedule": "linear"}, **arguments)
        trainer.train()
        logs[every] = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert names(trainer.state.log_history[-1]) == set()
    assert [names(entry) for entry in logs[2]] == [FIGURES] * 2
    for name in FIGURES - {"second_pass_time"}:
        each = [entry[f"grad_reg/{name}"] for entry in logs[1]]
        means = [(each[0] + each[1]) / 2, (each[2] + each[3]) / 2]
        assert [entry[f"grad_reg/{name}"] for entry in logs[2]] == means


def test_skipped_steps_are_counted(tmp_path):
    """A second gradient that is not finite leaves the step to g1 and shows in the log as a running count."""
    model = llama()
    trainer = build("sft", tmp_path, model=model, wrapped={**OF_MICRO_BATCHES}, max_steps=2)
    spy, compute_loss = Spy(trainer), trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: (
        compute_loss(*args, **kwargs) * (float("nan") if len(spy.losses) % 2 == 0 else 1.0)
    )
    trainer.train()
    assert penalties(trainer, "skipped") == [1.0, 2.0]
    plain = build("sft", tmp_path, max_steps=2)
    plain.train()
    assert_same(weights(model), weights(plain.model))


def test_second_call_of_train_goes_on(tmp_path):
    """Training twice continues the count of steps, logs nothing left over from before, and stays regularized."""
    trainer = build("sft", tmp_path, wrapped={**OF_MICRO_BATCHES, "warmup_steps": 1}, max_steps=3, logging_steps=2)
    spy = Spy(trainer)
    trainer.train()
    assert (len(spy.losses), trainer._gradreg_attachment.optimizer.step_count) == (3 + 2, 3)
    trainer.train()
    assert (len(spy.losses), trainer._gradreg_attachment.optimizer.step_count) == (5 + 6, 6)
    assert penalties(trainer, "strength") == [OF_MICRO_BATCHES["strength"]]


class Interrupt(TrainerCallback):
    """Raises in the middle of the first window, once."""

    def on_substep_end(self, args, state, control, **_):
        if not hasattr(self, "raised"):
            self.raised = True
            raise KeyboardInterrupt


@pytest.mark.parametrize("wrapped", [AT_THETA, OF_MICRO_BATCHES], ids=["at theta", "real"])
def test_training_after_an_interrupted_window_is_clean(wrapped, tmp_path):
    """What was recorded of a window that never ended is not repeated in the next training."""
    trainers = []
    for settings in (None, wrapped):
        trainer = build("sft", tmp_path, wrapped=settings, gradient_accumulation_steps=4, callbacks=[Interrupt()])
        spy = Spy(trainer)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        trainer.train()
        trainers.append(trainer)
    assert len(spy.losses) == 2 + 2 * 4 * 3  # both passes before the interruption; passes, micro-batches, steps
    same = [torch.equal(*pair) for pair in zip(*(trainer.model.parameters() for trainer in trainers), strict=True)]
    assert all(same) == (wrapped is AT_THETA)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("settings", [REAL, OF_MICRO_BATCHES], ids=["step", "micro_batch"])
@pytest.mark.parametrize("at", [2, 3, 4])
def test_nothing_is_left_behind_by_an_error(error, at, settings, tmp_path):
    """An error in a loss leaves the weights at θ, bit for bit, and a trainer that trains as if it had not happened."""
    trainer = build("sft", tmp_path, wrapped=settings, gradient_accumulation_steps=2)
    start, spy = weights(trainer.model), Spy(trainer)
    spied, attributes = trainer.compute_loss, None

    def failing(*args, **kwargs):
        if len(spy.losses) == at - 1 and not hasattr(failing, "raised"):
            failing.raised = True
            raise error("on purpose")
        return spied(*args, **kwargs)

    trainer.compute_loss = failing
    attach(trainer)
    attributes = vars(trainer).keys()
    with pytest.raises(error, match="on purpose"):
        trainer.train()
    assert_same(weights(trainer.model), start)
    assert vars(trainer).keys() >= attributes
    assert trainer.log.__name__ == "log"
    if settings is REAL:  # every one of these losses belongs to the end of a window, or to its repetition
        assert trainer.accelerator.sync_gradients
    trainer.train()
    untroubled = build("sft", tmp_path, wrapped=settings, gradient_accumulation_steps=2)
    untroubled.train()
    assert_same(weights(trainer.model), weights(untroubled.model))


def test_attaching_between_trainings(tmp_path):
    """A trainer can train plainly, attached, and plainly again; warm-up counts from the attachment."""
    trainer = build("sft", tmp_path, base=None, max_steps=2)
    spy, passes = Spy(trainer), []
    for settings in (None, {**OF_MICRO_BATCHES, "warmup_steps": 1}, None, {**OF_MICRO_BATCHES}):
        if settings is not None:
            attach(trainer, **settings)
        before = len(spy.losses)
        trainer.train()
        passes.append(len(spy.losses) - before)
        if settings is not None:
            detach(trainer)
    assert passes == [2, 3, 2, 4]


def test_one_wrapper_serves_two_trainers_in_turn(tmp_path):
    """A wrapper follows the trainer that trains, and returns to the other one when that trains again."""
    model = llama()
    wrapper = GradRegOptimizer(adamw(model), **OF_MICRO_BATCHES)
    trainers = []
    for _ in range(2):
        trainer = build("sft", tmp_path, model=model, base=None, max_steps=2)
        trainer.optimizer = wrapper
        trainers.append(trainer)
    spies = [Spy(trainer) for trainer in trainers]
    for turn, (trainer, spy) in enumerate(zip(trainers * 2, spies * 2, strict=True)):
        trainer.train()
        assert len(spy.losses) == 2 * 2 * (1 + turn // 2)
        assert wrapper._attachment.trainer is trainer
        assert [hasattr(other, "_gradreg_attachment") for other in trainers] == [other is trainer for other in trainers]
    assert wrapper.step_count == 8


def test_trainer_inside_a_callback_of_another(tmp_path):
    """Two trainers with wrappers of their own, one trained between the other's steps, each find their own wrapper."""
    inner = build("sft", tmp_path, wrapped=OF_MICRO_BATCHES, max_steps=1)

    class TrainInner(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 1:
                inner.train()

    outer = build("sft", tmp_path, wrapped=OF_MICRO_BATCHES, max_steps=2, callbacks=[TrainInner()])
    spies = [Spy(outer), Spy(inner)]
    outer.train()
    assert [len(spy.losses) for spy in spies] == [4, 2]
    assert [trainer._gradreg_attachment.trainer for trainer in (outer, inner)] == [outer, inner]


def test_wrapper_given_to_an_attached_trainer_takes_over(tmp_path):
    """A trainer whose wrapper is replaced attaches to the new one; one whose wrapper is lost refuses to train plainly."""
    trainer = build("sft", tmp_path, wrapped=OF_MICRO_BATCHES, max_steps=1)
    trainer.train()
    trainer.optimizer = GradRegOptimizer(SGD(trainer.model.parameters(), lr=0.1), **{**OF_MICRO_BATCHES, "strength": 0.02})
    trainer.train()
    assert penalties(trainer, "strength") == [0.02]
    trainer.optimizer = SGD(trainer.model.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="not the GradRegOptimizer that was attached any more"):
        trainer.train()
