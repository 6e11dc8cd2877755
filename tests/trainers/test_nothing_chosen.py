"""With nothing chosen: the strength is found, micro-batches have norms of their own, completions are reweighted."""

import logging

import pytest
import torch
from trainers import build, every_kind, llama, penalties, weights

from gradreg_optim import PUBLISHED, GradRegCallback, GradRegConfig, attach
from gradreg_optim.core.strength import AIM, STEPS

LENGTH = {"max_steps": STEPS + 2, "gradient_accumulation_steps": 2}
LOSSES = ["grpo", "dapo", "bnpo", "dr_grpo", "cispo", "sapo"]


@pytest.fixture(autouse=True)
def _heard(caplog):
    caplog.set_level(logging.WARNING)


def trained(kind, folder, **arguments):
    """A trainer that was attached with nothing chosen."""
    trainer = build(kind, folder, **{**LENGTH, **arguments})
    attach(trainer)
    trainer.train()
    return trainer


def assert_settled(trainer, caplog):
    """The ratio is near its aim while γ is found; then γ is a number, the last one logged, and said once."""
    strength = trainer.optimizer.param_groups[0]["gradreg_strength"]
    assert isinstance(strength, float)
    assert penalties(trainer, "strength")[-1] == pytest.approx(strength)
    ratios = penalties(trainer, "penalty_ratio")[:STEPS]
    assert 0.5 * AIM < sum(ratios) / STEPS < 2 * AIM
    said = [record.getMessage() for record in caplog.records if "strength settled" in record.getMessage()]
    assert len(said) == 1
    assert f"strength={strength:.3g}" in said[0]
    return strength


@every_kind
def test_the_strength_settles(kind, tmp_path, caplog):
    """To the same number, bit for bit, in each run."""
    trainer = trained(kind, tmp_path, learning_rate=1e-3)
    strength = assert_settled(trainer, caplog)
    again = trained(kind, tmp_path, learning_rate=1e-3)
    assert again.optimizer.param_groups[0]["gradreg_strength"] == strength
    if kind in ("grpo", "rloo"):
        assert penalties(trainer, "reweighted") == [1.0] * LENGTH["max_steps"]


@pytest.mark.parametrize("loss_type", LOSSES)
def test_losses_of_grpo(loss_type, tmp_path, caplog):
    """All of them are reweighted."""
    try:
        trainer = trained("grpo", tmp_path, learning_rate=1e-3, loss_type=loss_type)
    except ValueError as error:  # an older trl
        pytest.skip(str(error))
    assert_settled(trainer, caplog)
    assert set(penalties(trainer, "reweighted")) == {1.0}


def test_adapters(tmp_path, caplog):
    """LoRA has a ratio of its own for each unit of γ, and the strength makes up for it."""
    peft = pytest.importorskip("peft", reason="LoRA comes with peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    assert_settled(trained("sft", tmp_path, learning_rate=1e-3, peft_config=lora, base=None), caplog)


def test_resumed_in_the_middle_of_its_steps(tmp_path):
    """From a checkpoint of the trainer, to the bit."""
    length = {"max_steps": STEPS + 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-3}
    results = []
    for resume in (False, True):
        model = llama()
        trainer = build("sft", tmp_path, model=model, save_strategy="steps", save_steps=4, **length)
        attach(trainer)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4") if resume else None)
        results.append((weights(model), trainer.optimizer.param_groups[0]["gradreg_strength"]))
    (whole, strength), (resumed, again) = results
    assert again == strength
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


WAYS = {
    "settings": lambda trainer: attach(trainer, **PUBLISHED),
    "config": lambda trainer: attach(trainer, GradRegConfig(grad_reg_published=True)),
    "callback": lambda trainer: trainer.add_callback(GradRegCallback(**PUBLISHED)),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_published_step(way, tmp_path):
    """The norm of the step, completions as they are, one strength and ε, no check."""
    trainer = build("grpo", tmp_path, max_steps=2, gradient_accumulation_steps=2)
    WAYS[way](trainer)
    trainer.train()
    assert set(penalties(trainer, "strength")) == {1e-2}
    assert set(penalties(trainer, "eps")) == {1e-3}
    assert set(penalties(trainer, "reweighted")) == {0.0}
    assert all("grad_reg/self_check" not in entry for entry in trainer.state.log_history)
