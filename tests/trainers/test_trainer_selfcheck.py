"""A loss is repeated at the same weights: in the first regularized steps, and now and then."""

import re
import warnings

import pytest
import torch
from torch.optim import SGD
from trainers import AT_THETA, REAL, assert_same, at_theta, build, every_kind, llama, penalties, weights
from trl import SFTTrainer

pytestmark = at_theta


class Elsewhere(SFTTrainer):
    """Weighs its loss by a count that it keeps where nobody looks for it: on a class."""

    @staticmethod
    def Count():
        return type("Count", (), {"value": 0})

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.hidden.value += 1
        return loss * (1.0 + self.weight * self.hidden.value)


def stateful(folder, *, weight=0.1, **arguments):
    trainer = build("sft", folder, trainer_class=Elsewhere, **arguments)
    trainer.hidden, trainer.weight = Elsewhere.Count(), weight
    return trainer


@pytest.mark.parametrize("accumulation", [1, 2])
def test_loss_with_hidden_state_is_refused(accumulation, tmp_path):
    """A loss that is another one when it is repeated at θ stops the training at its first step, with both values."""
    trainer = stateful(tmp_path, wrapped=REAL, gradient_accumulation_steps=accumulation)
    before = weights(trainer.model)
    with pytest.raises(RuntimeError, match=r"Elsewhere: the first loss was \d.*, and \d.* when.*plain attributes") as caught:
        trainer.train()
    assert "\n" not in str(caught.value)
    assert_same(weights(trainer.model), before)
    assert trainer.hidden.value == accumulation + 2  # without and with gradients enabled


def test_state_that_does_not_matter_is_allowed(tmp_path):
    """Hidden state without an influence on the loss passes."""
    stateful(tmp_path, weight=0.0, wrapped=REAL).train()


def test_strength_zero_is_not_checked(tmp_path):
    """Without a second pass nothing is repeated: a loss with hidden state trains."""
    trainer = stateful(tmp_path, wrapped={"strength": 0.0})
    trainer.train()
    assert trainer.hidden.value == 3


def repeated_in(trainer, trainings=1):
    """The steps of each training in which a loss is computed without gradients."""
    calls, compute_loss = [], trainer.compute_loss

    def spy(*args, **kwargs):
        calls.append((trainer.state.global_step, torch.is_grad_enabled()))
        return compute_loss(*args, **kwargs)

    trainer.compute_loss, steps = spy, []
    for _ in range(trainings):
        trainer.train()
        steps.append([step for step, with_gradient in calls if not with_gradient])
        calls.clear()
    return steps


@every_kind
def test_runs_in_the_first_regularized_steps(kind, tmp_path):
    """One forward more without gradients in the first two steps that are regularized, and again in a second training."""
    trainer = build(kind, tmp_path, wrapped={**REAL, "warmup_steps": 1}, gradient_accumulation_steps=2)
    assert repeated_in(trainer, trainings=2) == [[1, 2], [0, 1]]  # the second training begins after the warm-up


def resting(model):
    """Keeps the weights, so that each step is as well-behaved as the first."""
    return SGD(model.parameters(), lr=0.0)


@pytest.mark.filterwarnings("ignore:Gradient regularization. the self-check")  # steps of .07 in so small a model
def test_runs_again_later_and_with_each_check(tmp_path):
    """In regularized steps 1, 2, 10 and 100, and where the difference is checked as well."""
    unchecked = {"base": resting, "max_steps": 101, "logging_steps": 200}
    assert repeated_in(build("sft", tmp_path, wrapped=REAL | {"check_every": 0}, **unchecked)) == [[0, 1, 9, 99]]
    checked = {"wrapped": REAL | {"check_every": 4, "shrink": False}, "base": resting, "max_steps": 11}
    assert repeated_in(build("sft", tmp_path, **checked)) == [[0, 1, 4, 8, 9]]


class Later(Elsewhere):
    """The same, from the second step on."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.weight = 0.1 if self.state.global_step else 0.0
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_a_loss_that_changes_later_is_told_once(tmp_path):
    """It was repeatable in the first step: a warning with what was seen, causes and a remedy, and training goes on."""
    trainer = build("sft", tmp_path, wrapped=REAL, trainer_class=Later, max_steps=10)
    trainer.hidden = Elsewhere.Count()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    told = [str(warning.message) for warning in caught if "repeated" in str(warning.message)]
    assert len(told) == 1
    assert re.match(
        r".*in regularized step 2 of Later the first loss was \d.*, and \d.*Usual causes: .*Remedy: keep", told[0]
    )
    assert len(penalties(trainer, "penalty_ratio")) == 10


def test_dropout_and_inputs_are_the_recorded_ones(tmp_path):
    """The repeated loss equals the recorded one bit for bit, under dropout; afterwards it has left no trace."""
    results = []
    for wrapped in (None, {**AT_THETA, "norm_of": "step"}):
        model, losses = llama(attention_dropout=0.3), []
        trainer = build("sft", tmp_path, model=model, wrapped=wrapped, loss_type="dft", gradient_accumulation_steps=2)
        compute_loss = trainer.compute_loss
        trainer.compute_loss = lambda *a, f=compute_loss, kept=losses, **k: kept.append(f(*a, **k)) or kept[-1]
        trainer.train()
        results.append((weights(model), torch.get_rng_state()))
    assert_same(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(losses[2], losses[0])
    assert not losses[2].requires_grad


def test_a_warm_up_as_long_as_the_training_is_told(tmp_path):
    """Nothing would have the penalty."""
    trainer = build("sft", tmp_path, wrapped={"strength": 1.0, "warmup_steps": 9})
    with pytest.warns(UserWarning, match=r"warmup_steps=9.*none has the penalty.*Remedy"):
        trainer.train()
