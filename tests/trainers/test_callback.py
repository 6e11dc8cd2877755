"""The penalty as a callback, and what a run says about it: the configuration of trackers and the model card."""

import json
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
from test_trainer_attach import belongings
from torch.optim import SGD
from trainers import REAL, adamw, assert_same, build, llama, own_figures, penalties, weights
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback, integration_utils

from gradreg_optim import GradRegCallback, GradRegConfig, GradRegOptimizer, attach, detach
from gradreg_optim.trainers.attachment import attachment_of


def given(trainer_of):
    return trainer_of(callbacks=[GradRegCallback(**REAL)])


def added(trainer_of):
    trainer = trainer_of()
    trainer.add_callback(GradRegCallback(**REAL))
    return trainer


def attached(trainer_of):
    trainer = trainer_of()
    attach(trainer, **REAL)
    return trainer


@pytest.mark.parametrize("base", [None, adamw], ids=["created", "given"])
@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_it_is_attach(kind, base, tmp_path):
    """Given to the constructor or added later, in two trainings in a row: weights and logs of ``attach``, bit for bit."""
    results = []
    for how in (attached, given, added):
        trainer = how(lambda **more: build(kind, tmp_path, base=base, gradient_accumulation_steps=2, **more))
        trainer.train()
        first = weights(trainer.model)
        trainer.train()
        figures = [penalties(trainer, name) for name in ("penalty_ratio", "g1_norm", "g2_norm", "curvature")]
        results.append((first, weights(trainer.model), figures, own_figures(trainer)))
    for other in results[1:]:
        assert_same(results[0][0], other[0])
        assert_same(results[0][1], other[1])
        assert results[0][2:] == other[2:]
    assert len(results[0][2][0]) == 3
    plain = build(kind, tmp_path, base=base, gradient_accumulation_steps=2)
    plain.train()
    assert any(not value.equal(results[0][0][name]) for name, value in weights(plain.model).items())


def test_it_attaches_in_the_constructor(tmp_path):
    """Whoever looks at the trainer before it trains finds it attached; a callback added later waits for training."""
    assert attachment_of(given(lambda **more: build("sft", tmp_path, base=None, **more))) is not None
    assert attachment_of(added(lambda **more: build("sft", tmp_path, base=None, **more))) is None


@pytest.mark.parametrize("how", [given, added])
def test_nothing_happens_twice(how, tmp_path):
    """Beside ``attach`` with the same settings, and beside a second callback, it changes nothing."""
    results = []
    for more in (0, 1):
        trainer = how(lambda **extra: build("sft", tmp_path, base=None, **extra))
        attachment = attachment_of(trainer)
        if more and attachment is None:
            attach(
                trainer, GradRegConfig(**{f"grad_reg_{name}": 0 if value is None else value for name, value in REAL.items()})
            )
            attachment = attachment_of(trainer)
        if more:
            trainer.add_callback(GradRegCallback(**REAL))
            trainer.add_callback(GradRegCallback())
        trainer.train()
        assert attachment_of(trainer) is attachment or not more
        assert len(penalties(trainer, "penalty_ratio")) == 3
        results.append(weights(trainer.model))
    assert_same(*results)


def test_a_given_wrapper_is_used(tmp_path):
    """Without settings it leaves the wrapper that a trainer was given as it is."""
    trainer = build("sft", tmp_path, wrapped=REAL, callbacks=[GradRegCallback])
    assert attachment_of(trainer).optimizer is trainer.optimizer
    assert trainer.optimizer.param_groups[0]["gradreg_strength"] == REAL["strength"]


def test_detach_removes_it(tmp_path):
    """Detached, a trainer is the one without the callback, and its next training is plain."""
    trainer = build("sft", tmp_path)
    before = belongings(trainer)
    trainer.add_callback(GradRegCallback(**REAL))
    trainer.train()
    detach(trainer)
    assert belongings(trainer)["callbacks"] == before["callbacks"]
    trainer.train()
    assert attachment_of(trainer) is None

    trainer = build("sft", tmp_path, callbacks=[GradRegCallback(**REAL)])
    detach(trainer)
    again = build("sft", tmp_path)
    assert [type(callback) for callback in trainer.callback_handler.callbacks] == [
        type(callback) for callback in again.callback_handler.callbacks
    ]
    assert vars(trainer).keys() == vars(again).keys()


REFUSED = {
    "a misspelt setting": (
        lambda _: GradRegCallback(strenght=1.0),
        TypeError,
        "GradRegCallback got.*Did you mean 'strength'",
    ),
    "a broken rule": (lambda _: GradRegCallback(strength=-1.0), ValueError, "strength=-1.0"),
    "no config": (lambda _: GradRegCallback(0.1), TypeError, r"config=0.1 is a float.*GradRegCallback\(strength="),
    "no trainer": (
        lambda _: GradRegCallback().on_train_begin(None, None, None),
        RuntimeError,
        "no transformers.Trainer had this callback.*callbacks=",
    ),
    "two settings": (
        lambda build: build(wrapped=REAL, callbacks=[GradRegCallback(strength=1.0)]),
        ValueError,
        "settings of its own",
    ),
    "two settings, late": (
        lambda build: [trainer := build(wrapped=REAL), trainer.add_callback(GradRegCallback(strength=1.0)), trainer.train()],
        ValueError,
        "settings of its own",
    ),
    "two callbacks": (
        lambda build: build(base=None, callbacks=[GradRegCallback(strength=1.0), GradRegCallback(strength=2.0)]),
        ValueError,
        "attached already, with other settings",
    ),
}


@pytest.mark.parametrize(("action", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_mistakes_are_refused(action, error, message, tmp_path):
    """Wrong settings at once, contradictions from the trainer."""
    with pytest.raises(error, match=message):
        action(lambda **arguments: build("sft", tmp_path, **arguments))


def test_too_late_for_deepspeed_says_what_to_do(tmp_path):
    """Once an engine holds the optimizer's parameters, nothing is attached."""
    trainer = build("sft", tmp_path)
    trainer.accelerator.deepspeed_engine_wrapped = SimpleNamespace()
    with pytest.raises(RuntimeError, match=r"DeepSpeed.*attach\(trainer\).*GradRegCallback.*for the first time"):
        attach(trainer, **REAL)
    trainer.add_callback(GradRegCallback(**REAL))
    with pytest.raises(RuntimeError, match=r"DeepSpeed.*too late to attach"):
        trainer.train()
    assert attachment_of(trainer) is None


class Adding(TrainerCallback):
    """Adds the penalty when training has begun."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, *_, **__):
        self.trainer.add_callback(GradRegCallback(**REAL))


def test_too_late_in_a_training_is_refused_or_waits(tmp_path):
    """A callback that another one adds in training is called by that training, in which it cannot regularize."""
    trainer = build("sft", tmp_path)
    trainer.add_callback(Adding(trainer))
    with pytest.raises(RuntimeError, match="had this callback when its training began"):
        trainer.train()


class Run:
    """W&B, trackio and TensorBoard of Transformers over stand-ins for their libraries; ``config`` is what each keeps."""

    def __init__(self, patch):
        self.config = {"wandb": {}, "trackio": {}, "tensorboard": {}}
        for name in ("wandb", "trackio"):
            module = MagicMock()
            module.config.update = lambda new, allow_val_change, name=name: self.config[name].update(new)
            patch.setitem(sys.modules, name, module)
            patch.setattr(integration_utils, f"is_{name}_available", lambda: True)
        for name in ("sdk", "sdk.lib", "sdk.lib.config_util"):
            patch.setitem(sys.modules, f"wandb.{name}", MagicMock(ConfigError=KeyError))
        patch.setitem(sys.modules, "tensorboardX", MagicMock())
        patch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
        self.writer = MagicMock()
        self.writer.add_text = lambda tag, text: self.config["tensorboard"].update({tag: text})

    def callbacks(self):
        return [WandbCallback(), TrackioCallback(), TensorBoardCallback(self.writer)]

    def flags(self):
        """The flags of the penalty in each configuration, which has the trainer's own arguments as well."""
        texts = dict(self.config["tensorboard"])
        assert "learning_rate" in texts["args"]
        found = {"tensorboard": json.loads(texts["grad_reg"]) if "grad_reg" in texts else {}}
        for name in ("wandb", "trackio"):
            assert "learning_rate" in self.config[name]
            found[name] = {k: v for k, v in self.config[name].items() if k.startswith("grad_reg_")}
        return found


WAYS = {
    "attach": lambda make: attached(make),
    "callback": lambda make: given(make),
    "late callback": lambda make: added(make),
    "optimizers": lambda make: make(wrapped=REAL),
}


@pytest.mark.parametrize("how", WAYS)
def test_trackers_keep_the_settings(how, tmp_path, monkeypatch):
    """However the penalty came: each tracker's configuration has the flags with which the command line would repeat it."""
    run = Run(monkeypatch)

    def make(callbacks=(), **arguments):
        return build("sft", tmp_path, max_steps=1, callbacks=[*run.callbacks(), *callbacks], **arguments)

    WAYS[how](make).train()
    for tracker, flags in run.flags().items():
        assert set(flags) == set(vars(GradRegConfig())) - {"grad_reg_published"}, tracker
        assert flags["grad_reg_strength"] == REAL["strength"]
        assert flags["grad_reg_eps"] == REAL["eps"]
        assert flags["grad_reg_g1_clip"] is None
        assert flags["grad_reg_exclude"] is None


def test_trackers_keep_what_groups_and_callables_say(tmp_path, monkeypatch):
    """Strengths of several groups are a list, a schedule of one's own is its name, patterns are those that were given."""
    run = Run(monkeypatch)

    def halved(_step):
        return 0.5

    def base(model):
        body, head = list(model.model.parameters()), [model.lm_head.weight]
        return SGD([{"params": body, "gradreg_strength": 0.2}, {"params": head}], lr=0.1)

    trainer = build("sft", tmp_path, max_steps=1, base=base, callbacks=run.callbacks())
    attach(trainer, strength=0.1, schedule=halved, exclude="norm")
    trainer.train()
    for flags in run.flags().values():
        assert flags["grad_reg_strength"] == [0.2, 0.1]
        assert flags["grad_reg_schedule"] == "halved"
        assert flags["grad_reg_exclude"] == ["norm"]


def test_trackers_of_plain_runs_are_left_alone(tmp_path, monkeypatch):
    """Without the penalty nothing is added."""
    run = Run(monkeypatch)
    build("sft", tmp_path, max_steps=1, callbacks=run.callbacks()).train()
    assert set(map(len, run.flags().values())) == {0}


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("kind", ["sft", "plain"])
def test_the_model_card_has_the_tag(kind, how, tmp_path):
    """TRL's card and Transformers', beside the tags that they have anyway; not without the penalty, nor after detach."""

    def make(wrapped=None, callbacks=()):
        if kind == "sft":
            return build("sft", tmp_path, wrapped=wrapped, callbacks=list(callbacks), max_steps=1)
        arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, bf16=False)
        model = llama()
        optimizer = GradRegOptimizer(adamw(model), **wrapped) if wrapped else None
        return Trainer(model, arguments, callbacks=list(callbacks), optimizers=(optimizer, None))

    def card(trainer, **arguments):
        (tmp_path / "README.md").unlink(missing_ok=True)
        trainer.create_model_card(**arguments)
        return (tmp_path / "README.md").read_text()

    assert "gradreg_optim" not in card(make())
    trainer = WAYS[how](make)
    if attachment_of(trainer) is None:  # it would be when training begins
        attach(trainer)
    text = card(trainer, model_name="mine", tags="own")
    assert "- gradreg_optim\n" in text
    assert "- own\n" in text
    assert kind == "plain" or "- sft\n" in text
    detach(trainer)
    assert "gradreg_optim" not in card(trainer)
