"""The update of a trainer, against the formula computed in float64 from the recorded inputs, by other arithmetic."""

import functools

import pytest
import torch
import transformers
from torch.nn import functional as F
from torch.optim import SGD
from trainers import (
    OF_MICRO_BATCHES,
    REAL,
    UNCHECKED,
    Spy,
    assert_same,
    build,
    every_kind,
    first_passes,
    llama,
    penalties,
    weights,
)
from transformers import LlamaForCausalLM, TrainerCallback

from gradreg_optim import GradRegConfig, attach

EXCLUDED = ("embed_tokens", "lm_head")
sgd = functools.partial(lambda model: SGD(model.parameters(), lr=1.0))


def double(model, values):
    """A float64 model of the same shape with the given weights."""
    twin = LlamaForCausalLM(model.config).double()
    twin.load_state_dict({name: value.double() for name, value in values.items()})
    return twin


def log_probabilities(model, ids, attention_mask):
    """log p of each token after the first, given those before it."""
    logits = model(input_ids=ids, attention_mask=attention_mask).logits[:, :-1]
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


FIRST_LABEL = 0 if transformers.__version__ < "5" else 1
"""The first label that counts in the mean of a causal loss: version 4 includes one that nothing predicts."""


def sft_loss(model, window):
    """Mean over the tokens of the whole window."""
    masks = [inputs["labels"][:, 1:] != -100 for inputs in window]
    tokens = sum((inputs["labels"][:, FIRST_LABEL:] != -100).sum() for inputs in window)
    log_p = [log_probabilities(model, inputs["input_ids"], inputs["attention_mask"]) for inputs in window]
    sums = [(p * mask).sum() for p, mask in zip(log_p, masks, strict=True)]
    return [-part / tokens for part in sums]


def pairs(inputs):
    """Ids, attention mask and completion mask, chosen before rejected: trl 1.16 gets them so, 0.27 joins them so."""
    if "input_ids" in inputs:
        return inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"]
    length = max(inputs[f"{side}_input_ids"].shape[1] for side in ("chosen", "rejected"))

    def joined(name):
        sides = [inputs[f"{side}_{name}"] for side in ("chosen", "rejected")]
        completions = torch.cat([F.pad(side, (0, length - side.shape[1])) for side in sides])
        return torch.cat([inputs[f"prompt_{name}"]] * 2), completions

    prompts, completions = joined("attention_mask")
    masks = torch.cat([prompts, completions], 1), torch.cat([torch.zeros_like(prompts), completions], 1)
    return torch.cat(joined("input_ids"), 1), *masks


def dpo_loss(model, window):
    """Mean over micro-batches of −log σ(β·margin)."""
    reference, losses = double(model, weights(llama(seed=1))), []
    for inputs in window:
        ids, attention_mask, completion_mask = pairs(inputs)
        mask = completion_mask[:, 1:]
        ratios = [(log_probabilities(m, ids, attention_mask) * mask).sum(1) for m in (model, reference)]
        chosen, rejected = (ratios[0] - ratios[1]).chunk(2)
        losses.append(-F.logsigmoid(0.1 * (chosen - rejected)).mean() / len(window))
    return losses


def completion_log_probabilities(model, inputs):
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    length = inputs["completion_ids"].shape[1]
    return log_probabilities(model, ids, attention_mask)[:, -length:], inputs["completion_mask"]


def grpo_loss(model, window):
    """Score function over the tokens of the window: "old" is the policy that is differentiated, the ratio is 1."""
    sums, tokens = [], 0
    for inputs in window:
        log_p, mask = completion_log_probabilities(model, inputs)
        tokens = tokens + mask.sum()
        sums.append(-(log_p * mask * inputs["advantages"][:, None]).sum())
    return [part / tokens for part in sums]


def rloo_loss(model, window):
    """Mean over micro-batches of the clipped ratio to the policy that sampled."""
    losses = []
    for inputs in window:
        log_p, mask = completion_log_probabilities(model, inputs)
        ratio, advantages = ((log_p * mask).sum(1) - inputs["old_logps"]).exp(), inputs["advantages"]
        losses.append(-torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean() / len(window))
    return losses


# Each returns the losses of the micro-batches of a window, whose sum is the loss of the step.
LOSSES = {"sft": sft_loss, "dpo": dpo_loss, "grpo": grpo_loss, "rloo": rloo_loss}


def formula(kind, model, values, inputs, *, strength, eps, norm_of="step", excluded=EXCLUDED, ranks=1, **_):
    """g1 + (γ/ε)·(g2 − g1) at ``values``, and g1, in float64; g1 where a name contains an excluded part.

    For the norm of micro-batches it is the mean over them, each with its own g1 and g2. ``inputs`` are those
    of all passes; a micro-batch is that of so many ``ranks``, whose inputs follow one another.
    """
    window = distinct(inputs)
    count = len(window) // ranks

    def gradients(at, number=None):
        twin = double(model, at)
        losses = LOSSES[kind](twin, window)
        (sum(losses) if number is None else count * sum(losses[number::count])).backward()
        return {name: parameter.grad for name, parameter in twin.named_parameters()}

    values = {name: value.double() for name, value in values.items()}
    regularized = {name for name in values if not any(part in name for part in excluded)}
    combined = []
    for number in range(count) if norm_of == "micro_batch" else [None]:
        g1 = gradients(values, number)
        g2 = gradients({name: value + eps * g1[name] * (name in regularized) for name, value in values.items()}, number)
        combined.append({name: g1[name] + strength / eps * (g2[name] - g1[name]) * (name in regularized) for name in values})
    return {name: sum(of[name] for of in combined) / len(combined) for name in values}, gradients(values)


def distinct(inputs):
    """The inputs without those that repeat others."""
    found = {}
    for given in inputs:
        tensors = [value for value in given.values() if isinstance(value, torch.Tensor)]
        found.setdefault(str([value.tolist() for value in tensors]), given)
    return [*found.values()]


def norm(tensors):
    return torch.stack([tensor.double().norm() for tensor in tensors.values()]).norm().item()


def distance(one, other):
    return norm({name: one[name].double() - other[name].double() for name in other})


class Steps(TrainerCallback):
    """The weights before each step, and at the end."""

    def __init__(self, model):
        self.model, self.weights = model, []

    def on_step_begin(self, *_, **__):
        self.weights.append(weights(self.model))

    def on_train_end(self, *_, **__):
        self.weights.append(weights(self.model))

    def update(self, step):
        return {name: self.weights[step][name] - value for name, value in self.weights[step + 1].items()}


def trained(kind, folder, wrapped=REAL, **arguments):
    """A trainer that has taken one step of plain descent at rate 1, what it was given, and its weights over time."""
    model = llama()
    steps = Steps(model)
    unbounded = 1e9  # and not 0, with which transformers 4.57 logs no norm
    arguments = {"max_steps": 1, "max_grad_norm": unbounded, "learning_rate": 1.0, "base": sgd, **arguments}
    trainer = build(kind, folder, model=model, wrapped=wrapped, callbacks=[steps], **arguments)
    spy = Spy(trainer)
    trainer.train()
    return trainer, spy, steps


of_each_norm = pytest.mark.parametrize("settings", [REAL, OF_MICRO_BATCHES], ids=["step", "micro_batch"])


@every_kind
@of_each_norm
@pytest.mark.parametrize("accumulation", [1, 4])
def test_first_update_is_the_formula(kind, accumulation, settings, tmp_path):
    """θ moves by −g1 − (γ/ε)·(g2 − g1), and by −g1 in the embeddings, at every scaling of the accumulated losses."""
    trainer, spy, steps = trained(kind, tmp_path, settings, gradient_accumulation_steps=accumulation)
    if settings["norm_of"] == "step":
        assert len(spy.inputs) == first_passes(kind) * accumulation
    else:  # of the first micro-batch alone a loss is repeated
        assert len(spy.inputs) - 2 * accumulation in (0, 1)
    expected, g1 = formula(kind, trainer.model, steps.weights[0], spy.inputs, **settings)
    assert distance(expected, g1) > 0.02 * norm(g1)
    # Float32 gradients err by some 1e-6 of their norm, which the difference multiplies by γ/ε = 5.
    assert distance(steps.update(0), expected) < 2e-5 * norm(expected)
    assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(norm(expected), rel=2e-5)  # the same
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        torch.testing.assert_close(steps.update(0)[name].double(), g1[name], rtol=0, atol=1e-5)  # float32 against float64


@of_each_norm
def test_each_second_step_is_regularized(settings, tmp_path):
    """Four micro-batches run again in every other step; the update between is plain descent."""
    settings = {**settings, "every": 2}
    trainer, spy, steps = trained("sft", tmp_path, settings, gradient_accumulation_steps=4, max_steps=4)
    assert len(spy.inputs) == 2 * 8 + 2 * 4
    expected, _ = formula("sft", trainer.model, steps.weights[2], spy.inputs[12:20], **settings)
    assert distance(steps.update(2), expected) < 2e-5 * norm(expected)  # as for the first update
    _, g1 = formula("sft", trainer.model, steps.weights[1], spy.inputs[8:12], **settings)
    assert distance(steps.update(1), g1) < 2e-6 * norm(g1)
    assert penalties(trainer, "strength") == pytest.approx([0.05, 0.0, 0.05, 0.0])


@of_each_norm
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_uneven_last_window_is_the_formula_too(kind, settings, tmp_path):
    """Six micro-batches in windows of four: the second update comes from two, and is scaled so."""
    length = {"gradient_accumulation_steps": 4, "max_steps": -1, "num_train_epochs": 1}
    trainer, spy, steps = trained(kind, tmp_path, settings, count=12, **length)
    assert len(spy.inputs) == 2 * 4 + 2 * 2
    expected, _ = formula(kind, trainer.model, steps.weights[1], spy.inputs[8:], **settings)
    assert distance(steps.update(1), expected) < 2e-5 * norm(expected)  # as for the first update


def test_trainer_clips_the_combined_gradient(tmp_path):
    """``max_grad_norm`` sees the penalty: the norm that is logged and the update that is bounded are the combined one's."""
    trainer, spy, steps = trained("sft", tmp_path, max_grad_norm=0.5)
    expected, g1 = formula("sft", trainer.model, steps.weights[0], spy.inputs[:1], **REAL)
    assert norm(g1) != pytest.approx(norm(expected), rel=1e-3)  # or it could not be told which of the two was clipped
    assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(norm(expected), rel=2e-5)  # float32
    clipped = {name: gradient * (0.5 / norm(expected)) for name, gradient in expected.items()}
    assert distance(steps.update(0), clipped) < 2e-5 * norm(clipped)  # as for the unclipped update


@pytest.mark.parametrize(
    ("exclude", "excluded"),
    [("none", ()), (("mlp", "norm"), ("mlp", "norm", *EXCLUDED)), ((), EXCLUDED)],
    ids=["nothing", "patterns", "default"],
)
def test_exclusion_can_be_chosen(exclude, excluded, tmp_path):
    """Patterns are added to embeddings and output layer, which are the default, and "none" lifts it."""
    model = llama()
    steps = Steps(model)
    common = {"model": model, "max_steps": 1, "max_grad_norm": 0.0, "learning_rate": 1.0, "callbacks": [steps]}
    trainer = build("sft", tmp_path, base=sgd, **common)
    attach(trainer, exclude=exclude, **REAL)
    spy = Spy(trainer)
    trainer.train()
    expected, _ = formula("sft", model, steps.weights[0], spy.inputs[:1], excluded=excluded, **REAL)
    assert distance(steps.update(0), expected) < 2e-5 * norm(expected)  # float32, as above


def test_every_way_to_attach_trains_alike(tmp_path):
    """The wrapper as ``optimizers=``, settings by name, and settings in a config give the same weights, bit for bit."""
    results = []
    given = {"grad_reg_norm_of": "step", "grad_reg_resample": "reuse", "grad_reg_check_every": 0}
    config = GradRegConfig(grad_reg_strength=0.05, grad_reg_eps=0.01, grad_reg_g1_clip=0, grad_reg_g2_clip=0, **given)
    for wrapped, given in ((REAL, None), (None, {}), (None, {"config": config}), (None, REAL)):
        trainer = build("sft", tmp_path, wrapped=wrapped, gradient_accumulation_steps=2)
        if given is not None:
            attach(trainer, **given)
        trainer.train()
        results.append(weights(trainer.model))
    by_wrapper, by_default, by_config, by_name = results
    assert_same(by_config, by_wrapper)
    assert_same(by_name, by_wrapper)
    assert distance(by_default, by_wrapper) > 0


@of_each_norm
@pytest.mark.parametrize("kwargs", [{"use_reentrant": False}, {"use_reentrant": True}], ids=["", "reentrant"])
def test_gradient_checkpointing_changes_nothing(kwargs, settings, tmp_path):
    """With activations recomputed in both passes, under dropout, the weights are those without, bit for bit."""
    results = []
    for arguments in ({}, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs}):
        model = llama(attention_dropout=0.1)
        trainer = build("sft", tmp_path, model=model, wrapped=settings, gradient_accumulation_steps=2, **arguments)
        trainer.train()
        results.append(weights(model))
    assert_same(*results)


@every_kind
@pytest.mark.parametrize("norm_of", ["step", "micro_batch"])
def test_both_passes_see_the_same_dropout_masks(kind, norm_of, tmp_path):
    """At θ itself the second pass repeats every micro-batch's loss, bit for bit; without dropout the losses are others."""
    losses = {}
    for dropout in (0.0, 0.3):
        model = llama(attention_dropout=dropout)
        wrapped = {"strength": 1e-30, "eps": 1e-30, "norm_of": norm_of, **UNCHECKED}
        trainer = build(kind, tmp_path, model=model, wrapped=wrapped, gradient_accumulation_steps=4, max_steps=1)
        losses[dropout] = Spy(trainer).losses
        trainer.train()
    found = losses[0.3]
    firsts, repeated = (found[:4], found[4:]) if norm_of == "step" else (found[::2], found[1::2])
    assert firsts == repeated
    assert len(firsts) == 4
    assert losses[0.3] != losses[0.0]


def test_autocast_casts_the_moved_weights(tmp_path):
    """Under bf16 autocast the weights stay float32 and the second pass runs on them, not on bf16 copies from the first."""
    trainer = build("sft", tmp_path, wrapped={"strength": 0.05, "radius": 0.05}, bf16=True, base=sgd)
    trainer.train()
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert min(penalties(trainer, "perturbation_fidelity")) == pytest.approx(1.0, abs=1e-4)  # float32 weights
    assert all(0.5 < cosine < 0.9999 for cosine in penalties(trainer, "cosine"))


@of_each_norm
def test_only_adapters_move_with_lora(settings, tmp_path):
    """LoRA's adapters are perturbed and trained; frozen weights keep every bit, also while the second pass runs."""
    peft = pytest.importorskip("peft", reason="LoRA comes with peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    trainer = build("sft", tmp_path, base=None, peft_config=lora)
    attach(trainer, **settings)
    frozen = {name: value for name, value in weights(trainer.model).items() if "lora" not in name}
    adapters = {name: value for name, value in weights(trainer.model).items() if "lora" in name}
    seen, compute_loss = [], trainer.compute_loss

    def spy(model, *args, **kwargs):
        if torch.is_grad_enabled():
            seen.append(weights(trainer.model))
        return compute_loss(model, *args, **kwargs)

    trainer.compute_loss = spy
    trainer.train()
    for at in (*seen, weights(trainer.model)):
        assert_same({name: at[name] for name in frozen}, frozen)
    assert all(not torch.equal(seen[1][name], adapters[name]) for name in adapters)
    assert min(penalties(trainer, "penalty_ratio")) > 0
