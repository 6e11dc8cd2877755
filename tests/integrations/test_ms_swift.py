"""The plugin for ms-swift, in a trainer that creates its optimizer as ms-swift's do (``swift/trainers/mixin.py``, 4.6.0)."""

import pytest
from stacks import plugin
from trainers import REAL, assert_same, build, llama, weights
from transformers import Trainer
from trl import SFTTrainer

from gradreg_optim import attach
from gradreg_optim.trainers.attachment import attachment_of

ARGUMENTS = "grad_reg_strength=5e-2,grad_reg_eps=0.01, grad_reg_g1_clip=0,grad_reg_g2_clip=null"
"""``REAL``."""


class OptimizerCallback:
    """Creates Transformers' optimizer; ``seen`` is what that finds in ``--optim_args``."""

    def __init__(self, args, trainer):
        self.args, self.trainer = args, trainer

    def create_optimizer(self, model=None):
        self.seen = self.args.optim_args
        return Trainer.create_optimizer(self.trainer)


@pytest.fixture
def optimizers(monkeypatch):
    """ms-swift's map of optimizers after ``--external_plugins``."""
    names = {
        "OptimizerCallback": OptimizerCallback,
        "optimizers_map": {"default": OptimizerCallback, "other": OptimizerCallback},
    }
    return plugin(monkeypatch, "ms_swift", swift__optimizers=names).optimizers_map


def trained(optimizers, folder, name="gradreg", **arguments):
    """A trainer with ``--optimizer name``, after training."""

    class SwiftTrainer(SFTTrainer):
        def __init__(self, *args, **kwargs):
            self.optimizer_callback = optimizers[name](kwargs["args"], self)
            super().__init__(*args, **kwargs)

        def create_optimizer(self, model=None):
            self.optimizer = self.optimizer_callback.create_optimizer(model=model)
            self.optimizer.param_groups = [group for group in self.optimizer.param_groups if len(group["params"]) > 0]
            return self.optimizer

    trainer = build("sft", folder, base=None, trainer_class=SwiftTrainer, **arguments)
    trainer.train()
    return trainer


def test_names_are_registered(optimizers):
    """Each optimizer of ms-swift has its twin with the penalty, and keeps its own name."""
    assert set(optimizers) == {"default", "other", "gradreg", "gradreg_default", "gradreg_other"}
    assert optimizers["default"] is OptimizerCallback


@pytest.mark.parametrize("name", ["gradreg", "gradreg_other"])
def test_it_trains_as_attached(name, optimizers, tmp_path):
    """The weights of ``attach`` bit for bit, and its figures in the log; two trainings, since the optimizer stays."""
    expected = build("sft", tmp_path, base=None)
    attach(expected, **REAL)
    expected.train()
    trainer = trained(optimizers, tmp_path, name, optim_args=ARGUMENTS)
    assert_same(weights(trainer.model), weights(expected.model))
    assert sum("grad_reg/penalty_ratio" in entry for entry in trainer.state.log_history) == 3
    plain = trained(optimizers, tmp_path, "default")
    assert attachment_of(plain) is None
    assert any(not value.equal(weights(plain.model)[key]) for key, value in weights(trainer.model).items())
    for either in (expected, trainer):
        either.train()
    assert_same(weights(trainer.model), weights(expected.model))


def test_the_rest_is_for_the_optimizer_inside(optimizers, tmp_path):
    """Transformers finds ``--optim_args`` without the settings; the arguments of the run keep them."""
    given = "beta3=0.9,grad_reg_exclude=norm,lm_head,alpha=2"
    trainer = trained(optimizers, tmp_path, optim_args=given, max_steps=1)
    assert trainer.optimizer_callback.seen == "beta3=0.9,alpha=2"
    assert trainer.args.optim_args == given
    assert attachment_of(trainer).adoption.settings["exclude"] == ("norm", "lm_head")


def test_groups_without_parameters(optimizers, tmp_path):
    """ms-swift drops them: what is excluded in those that stay remains excluded."""
    model = llama()
    for name, parameter in model.named_parameters():
        # None of which has weight decay, so the first group is empty.
        parameter.requires_grad = "norm" in name
    trainer = trained(optimizers, tmp_path, optim_args="grad_reg_exclude=input_layernorm", model=model, max_steps=2)
    [group] = attachment_of(trainer).optimizer.param_groups
    assert len(group["params"]) == 5
    assert len(group["gradreg_excluded"]) == 2


@pytest.mark.parametrize(("given", "message"), [("grad_reg_strenght=1", "grad_reg_strength"), ("grad_reg_eps=-1", "eps=-1")])
def test_mistakes_end_it_before_training(given, message, optimizers, tmp_path):
    """From the constructor of the trainer."""
    with pytest.raises(ValueError, match=message):
        trained(optimizers, tmp_path, optim_args=given)
