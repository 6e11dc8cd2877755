"""Attaching and detaching: what is given back, what is refused, and trainers that cannot be regularized."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.optim import SGD
from trainers import AT_THETA, PLAIN, REAL, Spy, adamw, assert_same, at_theta, build, llama, penalties, weights
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import SFTTrainer

from gradreg_optim import GradRegCallback, GradRegConfig, GradRegOptimizer, attach, detach

pytestmark = at_theta


def belongings(trainer):
    """Everything that attaching may replace: attributes of trainer and accelerator, callbacks, the optimizer's groups."""
    optimizer = trainer.optimizer
    groups = (
        [] if optimizer is None else [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    )
    return {
        "trainer": dict(vars(trainer)),
        "accelerator": dict(vars(trainer.accelerator)),
        "callbacks": list(trainer.callback_handler.callbacks),
        "groups": groups,
    }


def assert_identical(one, other):
    """The same names with the same objects."""
    assert one["callbacks"] == other["callbacks"]
    assert one["groups"] == other["groups"]
    for owner in ("trainer", "accelerator"):
        assert one[owner].keys() == other[owner].keys()
        assert [name for name in one[owner] if one[owner][name] is not other[owner][name]] == []


@pytest.mark.parametrize("base", [None, adamw], ids=["created", "given"])
@pytest.mark.parametrize("spied", [False, True], ids=["", "replaced methods"])
def test_detach_gives_everything_back(base, spied, tmp_path):
    """Attached and detached, a trainer has the attributes, callbacks, optimizer and groups that it had, the very same."""
    trainer = build("sft", tmp_path, base=base)
    if spied:  # a method that someone has replaced on the trainer comes back as well
        Spy(trainer)
    before = belongings(trainer)
    attach(trainer, strength=0.1)
    assert trainer.compute_loss is not before["trainer"].get("compute_loss")
    detach(trainer)
    assert_identical(belongings(trainer), before)


@pytest.mark.parametrize("by", ["optimizers", "attach", "attach to created"])
def test_detached_after_training_trains_plainly(by, tmp_path):
    """After training at θ itself and detach, a training runs no second pass and ends where two plain ones do."""
    results = []
    for settings in (None, AT_THETA):
        base, wrapped = None if by == "attach to created" else adamw, settings if by == "optimizers" else None
        trainer = build("sft", tmp_path, base=base, wrapped=wrapped, max_steps=2)
        if settings and not wrapped:
            attach(trainer, **settings)
        trainer.train()
        if settings:
            detach(trainer)
        spy = Spy(trainer)
        trainer.train()
        assert len(spy.losses) == 2
        assert not isinstance(trainer.optimizer.optimizer, GradRegOptimizer)
        results.append(weights(trainer.model))
    assert_same(*results)


def test_detach_keeps_the_groups_own_keys(tmp_path):
    """Settings that groups brought themselves outlive the attachment that they steered."""

    def base(model):
        body, head = list(model.model.parameters()), [model.lm_head.weight]
        return SGD([{"params": body, "gradreg_strength": 0.0}, {"params": head}], lr=0.1)

    trainer = build("sft", tmp_path, base=base)
    before = belongings(trainer)
    attach(trainer, strength=0.1, exclude="none")
    assert [group["gradreg_strength"] for group in trainer.optimizer.param_groups] == [0.0, 0.1]
    detach(trainer)
    assert_identical(belongings(trainer), before)


def test_attaching_again_takes_the_new_settings(tmp_path):
    """Nothing of an earlier attachment's settings is left in the groups that a later one uses."""
    trainer = build("sft", tmp_path)
    attach(trainer, g1_clip=1.0, warmup_steps=5, schedule="linear")
    detach(trainer)
    attach(trainer, strength=0.3)
    group = trainer.optimizer.param_groups[0]
    assert (group["gradreg_strength"], group["gradreg_g1_clip"], group["gradreg_warmup_steps"]) == (0.3, 10.0, 0)


def attached(trainer):
    attach(trainer, strength=0.1)
    return trainer


REFUSED = {
    "attached twice": (lambda trainer: attach(attached(trainer)), RuntimeError, "attached already.*detach"),
    "not attached": (lambda trainer: detach(trainer), RuntimeError, "not attached.*attach"),
    "detached twice": (lambda trainer: [attach(trainer), detach(trainer), detach(trainer)], RuntimeError, "not attached"),
    "no trainer": (lambda trainer: attach(trainer.model), TypeError, "LlamaForCausalLM.*step\\(closure\\)"),
    "an optimizer": (lambda trainer: attach(adamw(trainer.model)), TypeError, "trainer=.*AdamW"),
    "no config": (lambda trainer: attach(trainer, 0.1), TypeError, "config=0.1 is a float.*strength="),
    "a long config": (lambda trainer: attach(trainer, trainer.model), TypeError, "config=<LlamaForCausalLM> is a Llama"),
    "unknown setting": (lambda trainer: attach(trainer, gamma=1.0), TypeError, "gamma"),
    "misspelt setting": (lambda trainer: attach(trainer, strenght=1.0), TypeError, "'strenght'. Did you mean 'strength'?"),
    "flag": (lambda trainer: attach(trainer, grad_reg_radius=1.0), TypeError, "Did you mean 'radius'?"),
    "key": (lambda trainer: attach(trainer, gradreg_eps=1.0), TypeError, "Did you mean 'eps'?"),
    "no scaler": (lambda trainer: attach(trainer, scaler=True), TypeError, "scaler=True is a bool"),
    "no model": (lambda trainer: attach(trainer, model={}), TypeError, "model=<dict> is a dict"),
    "no pattern": (lambda trainer: attach(trainer, exclude=3), ValueError, "exclude=3"),
    "broken rule": (lambda trainer: attach(trainer, strength=-1.0), ValueError, "strength=-1.0"),
    "eps and radius": (
        lambda trainer: attach(trainer, GradRegConfig(grad_reg_radius=0.1), eps=0.1),
        ValueError,
        "not both",
    ),
    "empty pattern": (lambda trainer: attach(trainer, exclude=("",)), ValueError, "non-empty"),
    "no match": (lambda trainer: attach(trainer, exclude="wte"), ValueError, "'wte' is part of no parameter name"),
    "all excluded": (
        lambda trainer: attach(trainer, exclude=("model", "lm_head")),
        ValueError,
        "nothing is left to regularize",
    ),
}


@pytest.mark.parametrize(("action", "error", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("base", [adamw, None], ids=["given", "created"])
def test_mistakes_are_refused(action, error, message, base, tmp_path):
    """Each mistake ends in an error that names it: at once, or with names of parameters, when the optimizer is created."""
    trainer = build("sft", tmp_path, base=base, max_steps=1)

    def act():
        action(trainer)
        trainer.create_optimizer()

    with pytest.raises(error, match=message):
        act()


def test_settings_are_given_once(tmp_path):
    """A trainer whose optimizer brings settings refuses others."""
    trainer = build("sft", tmp_path, wrapped=REAL)
    with pytest.raises(ValueError, match=r"attach got \['strength'\].*settings of its own.*one of the two"):
        attach(trainer, strength=0.1)
    with pytest.raises(ValueError, match="settings of its own"):
        attach(trainer, GradRegConfig())
    attach(trainer)


def test_refused_attachment_leaves_nothing(tmp_path):
    """After an error in attach the trainer has what it had, and trains."""
    trainer = build("sft", tmp_path, max_steps=1)
    before = belongings(trainer)
    with pytest.raises(ValueError, match="nothing is left"):
        attach(trainer, exclude=("model", "lm_head"))
    assert_identical(belongings(trainer), before)
    trainer.train()


class Stepless(SFTTrainer):
    """Computes its loss itself."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = model(input_ids=inputs["input_ids"], labels=inputs["labels"]).loss
        self.accelerator.backward(loss)
        return loss.detach()


class OwnBackward(SFTTrainer):
    """Calls backward on the loss, not on the accelerator."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        loss.backward()
        return loss.detach()


class TwoLosses(SFTTrainer):
    """Adds up two calls of compute_loss."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        inputs = self._prepare_inputs(inputs)
        loss = self.compute_loss(model, inputs) + self.compute_loss(model, inputs)
        self.accelerator.backward(loss)
        return loss.detach()


class Adversarial(SFTTrainer):
    """Goes back a second time after the whole ordinary step."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        super().training_step(model, dict(inputs), num_items_in_batch)
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        self.accelerator.backward(loss)
        return loss.detach()


UNREPEATABLE = {
    Stepless: "a loss that is not compute_loss's",
    OwnBackward: "a backward besides compute_loss's",
    TwoLosses: "called twice",
    Adversarial: "a loss that is not compute_loss's",
}


@pytest.mark.parametrize(("trainer_class", "message"), UNREPEATABLE.items())
def test_steps_that_cannot_be_repeated_are_refused(trainer_class, message, tmp_path):
    """A trainer whose gradients come from elsewhere raises before it takes a step that is not regularized."""
    trainer = build("sft", tmp_path, wrapped=REAL, trainer_class=trainer_class)
    before = weights(trainer.model)
    with pytest.raises(RuntimeError, match=message):
        trainer.train()
    assert_same(weights(trainer.model), before)


@pytest.mark.parametrize("trainer_class", UNREPEATABLE)
def test_they_train_at_strength_zero(trainer_class, tmp_path):
    """Without a penalty nothing has to be repeated: such a trainer then trains as it does without the wrapper."""
    results = []
    for wrapped in (None, {"strength": 0.0}):
        trainer = build("sft", tmp_path, wrapped=wrapped, trainer_class=trainer_class)
        trainer.train()
        results.append(weights(trainer.model))
    assert_same(*results)


def test_other_calls_of_compute_loss_are_ignored(tmp_path):
    """Losses that a callback computes between steps, gradients enabled, are not taken for micro-batches."""

    class Look(TrainerCallback):
        def on_step_end(self, *_, **__):
            batch = trainer.data_collator([trainer.train_dataset[0]])
            trainer.compute_loss(trainer.model, batch)

    results = []
    for wrapped in (None, AT_THETA):
        trainer = build("sft", tmp_path, wrapped=wrapped, callbacks=[Look()])
        trainer.train()
        results.append(weights(trainer.model))
    assert_same(*results)


def test_a_wrapper_built_before_trainers_are_imported():
    """It is used by a trainer that is imported later, which looks at the optimizer before its first step."""
    script = """
import sys, tempfile, torch
from gradreg_optim import GradRegOptimizer
model = torch.nn.Linear(2, 1)
optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), strength=0.1)
assert "transformers" not in sys.modules
from transformers import Trainer, TrainingArguments
class Mean(Trainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        return model(inputs["x"]).square().mean()
arguments = TrainingArguments(
    tempfile.mkdtemp(), max_steps=1, use_cpu=True, report_to="none", save_strategy="no", remove_unused_columns=False
)
trainer = Mean(model, arguments, train_dataset=[{"x": [1.0, 2.0]}] * 8, optimizers=(optimizer, None))
trainer.train()
assert "g2_norm" in optimizer.metrics
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)


class Recreating(SFTTrainer):
    """Makes an optimizer of its own, whatever it was given."""

    def create_optimizer(self, *_):
        self.optimizer = adamw(self.model)
        return self.optimizer


class Around(TrainerCallback):
    """Lets the trainer step the optimizer inside the wrapper."""

    def on_step_begin(self, args, state, control, optimizer=None, **_):
        optimizer.optimizer = optimizer.optimizer.optimizer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"trainer_class": Recreating}, "not the GradRegOptimizer"), ({"callbacks": [Around()]}, "took a step that was not")],
    ids=["another optimizer", "the one inside"],
)
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")  # the wrapper's step was passed over
def test_a_trainer_that_does_not_use_its_wrapper_is_stopped(arguments, message, tmp_path):
    """It was given a wrapper and trains without: an error at the latest at the end of the first step."""
    trainer = build("sft", tmp_path, wrapped=REAL, **arguments)
    with pytest.raises(RuntimeError, match=message):
        trainer.train()
    assert trainer.state.global_step <= 1


def created(tmp_path, **arguments):
    """A trainer whose ``create_optimizer`` makes the wrapper."""

    class Creating(SFTTrainer):
        def create_optimizer(self, *_):
            if self.optimizer is None:
                self.optimizer = GradRegOptimizer(adamw(self.model), **AT_THETA)
            return self.optimizer

    return build("sft", tmp_path, base=None, trainer_class=Creating, **arguments)


def test_a_wrapper_that_the_trainer_creates_is_used(tmp_path):
    """As plugins of training stacks do it: the second pass runs in each step."""
    trainer = created(tmp_path)
    spy = Spy(trainer)
    trainer.train()
    assert len(spy.losses) == 2 * 3


def lora(**settings):
    peft = pytest.importorskip("peft", reason="LoRA comes with peft")
    return peft, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **settings)


@pytest.mark.parametrize("settings", [{}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}], ids=["", "biases", "head"])
@pytest.mark.parametrize("strength", [0.05, 0.0])
def test_adapters_that_the_optimizer_lacks_are_noticed(settings, strength, tmp_path):
    """An optimizer built on the base model, and then peft_config=: nothing would be trained, and this is said."""
    _, config = lora(**settings)
    model = llama(attention_bias=True)
    trainer = build("sft", tmp_path, model=model, wrapped={**REAL, "strength": strength}, peft_config=config)
    before = weights(trainer.model)
    with pytest.raises((RuntimeError, ValueError), match=r"nothing would be trained.*get_peft_model.*attach"):
        trainer.train()
    assert_same(weights(trainer.model), before)


@pytest.mark.parametrize("how", ["get_peft_model", "attach"])
def test_the_remedies_for_adapters_work(how, tmp_path):
    """An optimizer built on the adapted model, and one that the trainer creates, train the adapters."""
    peft, config = lora()
    if how == "attach":
        trainer = build("sft", tmp_path, base=None, peft_config=config)
        attach(trainer, **REAL)
    else:
        trainer = build("sft", tmp_path, model=peft.get_peft_model(llama(), config), wrapped=REAL)
    before = weights(trainer.model)
    trainer.train()
    after = weights(trainer.model)
    assert {"lora" in name for name in before if not before[name].equal(after[name])} == {True}


def test_an_optimizer_of_another_model_is_noticed(tmp_path):
    """Its parameters are those of a copy, which get no gradients."""
    other = llama()
    trainer = build("sft", tmp_path, base=lambda _: adamw(other), wrapped=REAL)
    with pytest.raises(RuntimeError, match="is in the optimizer, so nothing would be trained"):
        trainer.train()


class Projecting(SFTTrainer):
    """Trains a scale that is no part of the model."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(model, inputs, *args, **kwargs) * self.scale.square()


def test_parameters_beside_the_model_are_trained(tmp_path):
    """An optimizer of parameters that the model does not have is right where they get gradients."""
    scale = nn.Parameter(torch.ones(()))
    arguments = {"trainer_class": Projecting, "max_steps": 1}  # the trainer clears the gradients of its model alone
    trainer = build("sft", tmp_path, base=lambda _: SGD([scale], lr=0.1), wrapped=REAL, **arguments)
    trainer.scale = scale
    trainer.train()
    assert scale.item() != 1


@pytest.mark.parametrize("by", ["optimizers", "attach", "callback"])
def test_an_accelerator_that_is_made_anew_is_used(by, tmp_path):
    """A search for hyperparameters makes one for each trial: the second pass runs in each training."""
    wrapped = REAL if by == "optimizers" else None
    callbacks = [GradRegCallback(**REAL)] if by == "callback" else []
    trainer = build("sft", tmp_path, base=None if by == "attach" else adamw, wrapped=wrapped, callbacks=callbacks)
    if by == "attach":
        attach(trainer, **REAL)
    spy = Spy(trainer)
    for _ in range(2):
        trainer.create_accelerator_and_postprocess()
        trainer.train()
        assert len(spy.losses) == 2 * 3
        assert "backward" not in vars(trainer.accelerator)
        spy.losses.clear()


@pytest.mark.parametrize("by", ["attach", "callback"])
def test_a_search_for_hyperparameters(by, tmp_path):
    """Every trial is regularized, and so is a training after the search."""
    pytest.importorskip("optuna", reason="the search needs a backend")
    trainer = Trainer(
        model_init=lambda _trial=None: llama(),
        args=TrainingArguments(output_dir=str(tmp_path), **PLAIN | {"max_steps": 2}),
        train_dataset=(rows := [{"input_ids": [3, 4, 5, 6], "labels": [3, 4, 5, 6]}] * 8),
        eval_dataset=rows[:2],
        callbacks=[GradRegCallback(**REAL)] if by == "callback" else [],
    )
    if by == "attach":
        attach(trainer, **REAL)
    ratios = []

    def rate(trial):
        ratios.append(len(penalties(trainer, "penalty_ratio")))
        return {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-2)}

    trainer.hyperparameter_search(hp_space=rate, n_trials=2, backend="optuna")
    trainer.train()
    assert [*ratios, len(penalties(trainer, "penalty_ratio"))] == [0, 2, 2]
