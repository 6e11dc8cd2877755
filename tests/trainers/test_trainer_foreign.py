"""Trainers whose optimizer steps in the backward: refused by name before training, or by what the first backward leaves."""

import pytest
import torch
from trainers import REAL, adamw, assert_same, build, weights
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer
from trl import SFTTrainer

from gradreg_optim import attach


def step_layer_by_layer(model):
    """What Transformers does for layerwise GaLore and APOLLO."""
    inner = {parameter: torch.optim.SGD([parameter], lr=0.1) for parameter in model.parameters()}

    def hook(parameter):
        inner[parameter].step()
        inner[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(hook)
    return LayerWiseDummyOptimizer(optimizer_dict=inner)


class Layerwise(SFTTrainer):
    """Creates its optimizer layer by layer."""

    def create_optimizer(self, *_, **__):
        if self.optimizer is None:
            self.optimizer = step_layer_by_layer(self.model)
        return self.optimizer


@pytest.mark.parametrize("given", [True, False], ids=["given", "created"])
def test_layerwise_optimizers_are_refused_by_name(given, tmp_path):
    """By attach, or before the first step where the trainer creates the optimizer."""
    trainer = build("sft", tmp_path, base=step_layer_by_layer if given else None, trainer_class=None if given else Layerwise)
    before = weights(trainer.model)

    def train():
        attach(trainer, strength=0.1)
        trainer.train()

    with pytest.raises(ValueError, match="optimizer=LayerWiseDummyOptimizer: it takes its steps in the backward"):
        train()
    assert_same(weights(trainer.model), before)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("by", ["optimizers", "attach"])
def test_hooks_that_step_are_named(by, accumulation, tmp_path):
    """The reason is the hooks, not a loss that differs when it is repeated at other weights."""
    wrapped = REAL if by == "optimizers" else None
    trainer = build("sft", tmp_path, base=adamw, wrapped=wrapped, gradient_accumulation_steps=accumulation)
    if by == "attach":
        attach(trainer, **REAL)
    step_layer_by_layer(trainer.model)
    with pytest.raises(RuntimeError, match="first backward has used up its gradients"):
        trainer.train()


def test_hooks_that_look_are_welcome(tmp_path):
    """A trainer whose parameters have hooks that log trains as without them."""
    results, norms = [], []
    for has_hooks in (False, True):
        trainer = build("sft", tmp_path, wrapped=REAL)
        if has_hooks:
            for parameter in trainer.model.parameters():
                parameter.register_post_accumulate_grad_hook(lambda p: norms.append(float(p.grad.norm())))
        trainer.train()
        results.append(weights(trainer.model))
    assert_same(*results)
    assert norms
