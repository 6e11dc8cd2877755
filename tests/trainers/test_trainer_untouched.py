"""What a trainer does besides its update stays as it is: losses, metrics, counters, random numbers, evaluation, rewards."""

import functools
import tempfile

import pytest
import torch
from trainers import (
    AT_THETA,
    REAL,
    Reward,
    Spy,
    assert_same,
    at_theta,
    build,
    dataset,
    every_kind,
    first_passes,
    llama,
    own_figures,
    penalties,
)
from transformers import TrainerCallback
from trl import GRPOConfig, SFTTrainer

from gradreg_optim import attach

CASES = {
    "sft": ("sft", {"gradient_accumulation_steps": 4}),
    "sft-dft": ("sft", {"loss_type": "dft"}),
    "sft-smoothed": ("sft", {"label_smoothing_factor": 0.1}),
    "sft-checkpointed": ("sft", {"gradient_checkpointing": True}),
    "sft-bf16": ("sft", {"bf16": True}),
    "sft-neftune": ("sft", {"neftune_noise_alpha": 5.0}),
    "dpo": ("dpo", {"gradient_accumulation_steps": 4}),
    "grpo": ("grpo", {"gradient_accumulation_steps": 1}),
    "grpo-accumulated": ("grpo", {"gradient_accumulation_steps": 4}),
    "grpo-old-policy": ("grpo", {"num_iterations": 2}),
    "grpo-entropy": (
        "grpo",
        {"use_adaptive_entropy": True, "entropy_target": 9.0, "entropy_coef_delta": 0.01, "gradient_accumulation_steps": 2},
    ),
    "rloo": ("rloo", {"gradient_accumulation_steps": 2}),
}
# trl 1.16 announces that label smoothing goes in 2.0, and then its case goes too.
pytestmark = [at_theta, pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated:FutureWarning")]
needs_adaptive_entropy = pytest.mark.skipif(
    not hasattr(GRPOConfig, "use_adaptive_entropy"), reason="trl 0.27 has no adaptive entropy coefficient"
)
every_case = pytest.mark.parametrize(
    "case", [pytest.param(case, marks=needs_adaptive_entropy if case == "grpo-entropy" else ()) for case in CASES]
)


def trained(case, wrapped=None):
    """What is left of three steps with dropout, clipping, and an evaluation in between."""
    kind, arguments = CASES[case]
    folder, model = tempfile.gettempdir(), llama(attention_dropout=0.1)  # nothing is written there
    evaluation = {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": dataset(kind, 4)}
    trainer = build(kind, folder, model=model, wrapped=wrapped, max_grad_norm=0.5, **evaluation, **arguments)
    trainer.train()
    # Numbers, texts and tensors that the trainer keeps, as text: so NaN equals NaN.
    simple = (bool, int, float, str, torch.Tensor, type(None))
    attributes = {name: str(value) for name, value in vars(trainer).items() if isinstance(value, simple)}
    attributes.pop("_current_train_step_time", None)
    return {
        "figures": own_figures(trainer),
        "attributes": attributes,
        "weights": {name: parameter.detach() for name, parameter in model.named_parameters()},
        "random": {"state": torch.get_rng_state()},
        "second passes": len(penalties(trainer, "second_pass_time")),
    }


plainly_trained = functools.cache(trained)


@every_case
@pytest.mark.parametrize("settings", [{"strength": 0.0}, AT_THETA], ids=["strength 0", "second pass at theta"])
def test_run_is_the_plain_one_bit_for_bit(case, settings):
    """Weights, logs, counters and random numbers are the plain trainer's, with no second pass and with one at θ itself."""
    plain, regularized = plainly_trained(case), trained(case, wrapped=settings)
    assert regularized["figures"] == plain["figures"]
    assert regularized["attributes"] == plain["attributes"]
    assert_same(regularized["weights"], plain["weights"])
    assert_same(regularized["random"], plain["random"])
    assert regularized["second passes"] == (3 if settings["strength"] else 0)


@every_case
def test_first_step_does_not_know_the_penalty(case):
    """At a real strength the first step's own figures are the plain trainer's, but for the gradient norm."""
    plain, regularized = plainly_trained(case), trained(case, wrapped=REAL)
    first, expected = dict(regularized["figures"][0]), dict(plain["figures"][0])
    assert first.pop("grad_norm") != expected.pop("grad_norm")
    assert first == expected
    name = "model.norm.weight"
    assert not torch.equal(regularized["weights"][name], plain["weights"][name])


@needs_adaptive_entropy
def test_adaptive_entropy_coefficient_moves_once_a_step():
    """Three steps move GRPO's coefficient by three times its delta, although the loss that moves it runs six times."""
    figures = trained("grpo-entropy", wrapped=REAL)["figures"]
    assert [entry["entropy_coef"] for entry in figures if "entropy_coef" in entry] == pytest.approx(
        [0.01, 0.02, 0.03]
    )  # sums


class Stateful(SFTTrainer):
    """Weighs its loss by a running mean kept in place, a count, and a list, and logs from inside the loss."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.mean.mul_(0.9).add_(0.1 * loss.detach())
        self.count += 1
        self.history.append(self.count)
        self.log({"count": self.count})
        return loss * (1.0 + self.mean) * self.count / len(self.history)


def test_state_of_a_loss_moves_once(tmp_path):
    """What a loss keeps on its trainer, in place or not, is in the second pass what it was in the first, and moves once."""
    results = []
    for wrapped in (None, AT_THETA):
        trainer = build("sft", tmp_path, wrapped=wrapped, trainer_class=Stateful, gradient_accumulation_steps=2)
        trainer.mean, trainer.count, trainer.history = torch.zeros(()), 0, []
        trainer.train()
        results.append((own_figures(trainer), trainer.mean, trainer.count, trainer.history, trainer.model.lm_head.weight))
    assert results[0][:4] == results[1][:4]
    assert torch.equal(results[0][4], results[1][4])
    assert results[0][2] == 6


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_completions_are_generated_and_rewarded_once(kind, tmp_path):
    """The second pass asks neither the model for completions nor the reward function for rewards."""
    reward, model = Reward(), llama()
    trainer = build(kind, tmp_path, model=model, wrapped=REAL, reward=reward, gradient_accumulation_steps=2)
    generations, generate = [], model.generate
    model.generate = lambda *args, **kwargs: generations.append(1) or generate(*args, **kwargs)
    spy = Spy(trainer)
    trainer.train()
    assert len(spy.losses) == 2 * (first_passes(kind) + 2 * 2)  # micro-batches, passes of three steps
    assert len(generations) == 3
    assert reward.scored == 2 * 2 * 3  # sequences, micro-batches, steps


@every_kind
def test_recorded_inputs_are_references(kind, tmp_path):
    """Both passes get the same tensors, not copies, and window boundaries; when the trainer steps all is forgotten."""
    recorded = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, *_, **__):
            recorded.append((len(trainer._gradreg_attachment.window.micro_batches), trainer.accelerator.sync_gradients))

    trainer = build(kind, tmp_path, wrapped=REAL, gradient_accumulation_steps=2, max_steps=1, callbacks=[Look()])
    spy = Spy(trainer)
    trainer.train()
    assert spy.addresses == spy.addresses[:2] * first_passes(kind)
    assert spy.boundaries == [False, True] * first_passes(kind)
    assert recorded == [(0, True)]


# trl 1.16 recomputes the logits that predict() returns and announces the end of that for 2.0.
@pytest.mark.filterwarnings("ignore:`return_outputs=True`, and the logits:FutureWarning")
@every_kind
def test_evaluation_and_prediction_are_the_plain_ones(kind, tmp_path):
    """An attached trainer evaluates and predicts as a plain one, before and after training, and records nothing."""
    figures, clocks = [], ("runtime", "per_second", "preparation_time")
    for settings in (None, AT_THETA):
        trainer = build(kind, tmp_path, wrapped=settings, eval_dataset=dataset(kind, 4), max_steps=1)
        if settings:
            attach(trainer)
        before = trainer.evaluate()
        trainer.train()
        after = trainer.predict(trainer.eval_dataset).metrics
        figures.append([{k: v for k, v in metrics.items() if not k.endswith(clocks)} for metrics in (before, after)])
    assert figures[0] == figures[1]
    assert trainer._gradreg_attachment.window is None
