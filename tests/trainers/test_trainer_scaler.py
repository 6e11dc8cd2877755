"""fp16 as Accelerate does it: a GradScaler around the trainer's steps. It scales float32 gradients here, as CPUs can."""

import pytest
import torch
from trainers import OF_MICRO_BATCHES, Spy, assert_same, build, penalties, weights

from gradreg_optim import attach, detach


def scaled(folder, scale, *, by="optimizers", **arguments):
    """A trainer under a scaler that grows every second step; the penalty comes with the optimizer or by attach()."""
    trainer = build("sft", folder, wrapped=OF_MICRO_BATCHES if by == "optimizers" else None, **arguments)
    scaler = trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
    # What Accelerate does before it clips, on devices that it lets compute in fp16.
    trainer.accelerator.unscale_gradients = lambda: scaler.unscale_(trainer.optimizer.optimizer)
    if by == "attach":
        attach(trainer, **OF_MICRO_BATCHES)
    return trainer


@pytest.mark.parametrize("by", ["optimizers", "attach"])
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
def test_scale_cancels(by, max_grad_norm, tmp_path):
    """A power of two that scales both gradients changes neither weights nor figures, clipped by the trainer or not."""
    results, figures = [], []
    for trainer in (
        build("sft", tmp_path, wrapped=OF_MICRO_BATCHES, gradient_accumulation_steps=2, max_grad_norm=max_grad_norm),
        scaled(tmp_path, 1024.0, by=by, gradient_accumulation_steps=2, max_grad_norm=max_grad_norm),
    ):
        trainer.train()
        results.append(weights(trainer.model))
        figures.append([penalties(trainer, name) for name in ("g1_norm", "g2_norm", "penalty_ratio", "curvature", "eps")])
    assert_same(*results)
    assert figures[0] == figures[1]
    assert trainer.accelerator.scaler.get_scale() == 2048.0


def test_overflow_skips_the_step_and_lowers_the_scale(tmp_path):
    """Gradients that overflow move nothing and count as no step; at a scale that fits, training is regularized."""
    trainer = scaled(tmp_path, 2.0**127, max_steps=1)
    start, spy, scaler = weights(trainer.model), Spy(trainer), trainer.accelerator.scaler
    trainer.train()
    wrapper = trainer._gradreg_attachment.optimizer
    assert_same(weights(trainer.model), start)
    assert (wrapper.step_count, scaler.get_scale()) == (0, 2.0**126)
    assert len(spy.losses) == 1  # there is no direction to take a second gradient along
    scaler.update(1024.0)
    trainer.train()
    assert (wrapper.step_count, len(spy.losses)) == (1, 3)
    assert penalties(trainer, "skipped") == [1.0]
    assert penalties(trainer, "penalty_ratio")[0] > 0


def test_attached_to_a_scaled_optimizer_that_exists(tmp_path):
    """Attached after a training, the wrapper's own step is what the scaler calls; detached, the base's is again."""
    trainer = scaled(tmp_path, 1024.0, by="nothing", max_steps=2)
    trainer.train()
    attach(trainer, **OF_MICRO_BATCHES)
    trainer.train()
    wrapper = trainer._gradreg_attachment.optimizer
    assert wrapper.step_count == 2
    assert min(penalties(trainer, "penalty_ratio")) > 0
    detach(trainer)
    spy = Spy(trainer)
    trainer.train()
    assert len(spy.losses) == 2
    assert wrapper.step_count == 0  # it left with its keys in the groups
