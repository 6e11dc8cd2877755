"""How a trainer computes: checkpointed, compiled, scaled, autocast, by adapters. Each update is the float64 formula's."""

import os

import pytest
import torch
from test_trainer_scaler import scaled
from test_trainer_update import FIRST_LABEL, Steps, distance, formula, norm, sft_loss, sgd, trained
from trainers import OF_MICRO_BATCHES, REAL, Spy, assert_same, build, llama, penalties, weights

from gradreg_optim import attach, detach

both_accumulations = pytest.mark.parametrize("accumulation", [1, 2])
ONE_STEP = {"max_steps": 1, "max_grad_norm": 1e9, "learning_rate": 1.0}


def assert_update(update, expected, g1, tolerance):
    """``update`` is ``expected``, up to a part of its norm that is far below what the penalty adds to g1."""
    assert distance(expected, g1) > 5 * tolerance * norm(expected)
    assert distance(update, expected) < tolerance * norm(expected)


# Dynamo, tracing TRL's loss, makes an instance of an autograd function and looks for a gradient where there is none.
@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning", "ignore:The .grad attribute:UserWarning"
)
@both_accumulations
@pytest.mark.parametrize(
    "arguments",
    [
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"torch_compile": True, "torch_compile_backend": "eager"},
    ],
    ids=["checkpointed", "checkpointed reentrant", "compiled"],
)
def test_forward_may_be_rewritten(arguments, accumulation, tmp_path):
    """Activations recomputed either way, or a compiled model: the combined gradient is the same one."""
    torch.compiler.reset()
    _, spy, steps = trained("sft", tmp_path, gradient_accumulation_steps=accumulation, **arguments)
    os.environ.pop("ACCELERATE_DYNAMO_BACKEND", None)
    expected, g1 = formula("sft", llama(), steps.weights[0], spy.inputs[:accumulation], **REAL)
    # Float32 gradients err by some 1e-6 of their norm, which the difference multiplies by γ/ε = 5.
    assert_update(steps.update(0), expected, g1, 2e-5)


@both_accumulations
@pytest.mark.parametrize("by", ["optimizers", "attach"])
def test_scaled_gradients_combine_alike(by, accumulation, tmp_path):
    """Under Accelerate's GradScaler both gradients carry its scale, and the update does not."""
    model = llama()
    steps = Steps(model)
    base = sgd if by == "optimizers" else None
    arguments = {**ONE_STEP, "base": base, "optim": "sgd", "gradient_accumulation_steps": accumulation}
    trainer = scaled(tmp_path, 1024.0, by=by, model=model, callbacks=[steps], **arguments)
    spy = Spy(trainer)
    trainer.train()
    assert trainer.accelerator.scaler.get_scale() == 1024.0
    expected, g1 = formula("sft", model, steps.weights[0], spy.inputs, **OF_MICRO_BATCHES)
    assert_update(steps.update(0), expected, g1, 2e-5)  # float32, as above


@both_accumulations
def test_autocast_errs_by_its_digits_only(accumulation, tmp_path):
    """Under bf16 autocast, with a step long enough for eight bits, the update is the formula's to the precision of bf16."""
    settings = {"norm_of": "step", "strength": 0.5, "radius": 0.2, "g1_clip": None, "g2_clip": None, "check_every": 0}
    trainer, spy, steps = trained("sft", tmp_path, wrapped=settings, bf16=True, gradient_accumulation_steps=accumulation)
    window = spy.inputs[:accumulation]
    _, g1 = formula("sft", trainer.model, steps.weights[0], window, **REAL)
    regularized = {name: value for name, value in g1.items() if "embed_tokens" not in name and "lm_head" not in name}
    expected, g1 = formula("sft", trainer.model, steps.weights[0], window, strength=0.5, eps=0.2 / norm(regularized))
    # Eight bits leave errors near 1% in a gradient, which the difference multiplies by γ/ε, here about 8.
    assert_update(steps.update(0), expected, g1, 0.1)


def adapters(model, loss, *, strength, eps, **_):
    """g1 + (γ/ε)·(g2 − g1) and g1 of the trainable parameters of ``model``, which is left at θ'."""
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    def gradients():
        found = torch.autograd.grad(loss(model), list(trainable.values()))
        return {name: gradient.double() for name, gradient in zip(trainable, found, strict=True)}

    g1 = gradients()
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter += eps * g1[name]
    g2 = gradients()
    return {name: g1[name] + strength / eps * (g2[name] - g1[name]) for name in trainable}, g1


@both_accumulations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_alone_move(dtype, accumulation, tmp_path):
    """LoRA: adapters in float32 take the formula's step, over a base of either dtype, which keeps every bit.

    Over bfloat16, whose rounding moves the update by 0.15 of itself, the formula runs on TRL's own loss in the same dtypes.
    """
    peft = pytest.importorskip("peft", reason="LoRA comes with peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    arguments = {**ONE_STEP, "gradient_accumulation_steps": accumulation, "optim": "sgd"}
    trainer = build("sft", tmp_path, model=llama().to(dtype), base=None, peft_config=lora, **arguments)
    settings = {"norm_of": "step", "strength": 1.0, "eps": 0.4, "g1_clip": None, "g2_clip": None}
    attach(trainer, **settings)
    spy, start = Spy(trainer), weights(trainer.model)
    trainer.train()
    end = weights(trainer.model)
    window = spy.inputs[:accumulation]
    if dtype == torch.float32:
        twin = peft.get_peft_model(llama().double(), lora).double()
        twin.load_state_dict({name: value.double() for name, value in start.items()}, strict=False)
        expected, g1 = adapters(twin, lambda model: sum(sft_loss(model, window)), **settings)
    else:
        detach(trainer)
        trainer.model.load_state_dict(start, strict=False)
        tokens = sum((inputs["labels"][:, FIRST_LABEL:] != -100).sum() for inputs in window)

        def loss(model):
            return sum(trainer.compute_loss(model, dict(inputs), num_items_in_batch=tokens) for inputs in window)

        expected, g1 = adapters(trainer.model, loss, **settings)
    assert {end[name].dtype for name in expected} == {torch.float32}
    frozen = end.keys() - expected.keys()
    assert {end[name].dtype for name in frozen} == {dtype}
    assert_same({name: end[name] for name in frozen}, {name: start[name] for name in frozen})
    # Float32 arithmetic, as above, on adapters of either base.
    assert_update({name: start[name] - end[name] for name in expected}, expected, g1, 2e-5)


class Solved:
    """In the first step each completion is worth something else, and later all are right."""

    __name__, calls = "reward", 0

    def __call__(self, completions, **_):
        self.calls += 1
        return [float(number) if self.calls == 1 else 1.0 for number in range(len(completions))]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_answers_that_are_all_right_move_nothing(kind, bf16, tmp_path):
    """All advantages are 0, and so is the gradient."""
    model = llama()
    arguments = {"model": model, "base": sgd, "callbacks": [steps := Steps(model)], "reward": Solved(), "bf16": bf16}
    trainer = build(kind, tmp_path, wrapped={"strength": 0.05}, **arguments)
    trainer.train()
    first, second, *later = steps.weights
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert len(later) == 2
    for after in later:
        assert_same(after, second)
    ratios = penalties(trainer, "penalty_ratio")
    assert ratios[0] > 0
    assert ratios[1:] == [0.0, 0.0]
