"""The plugin for verl, on an engine that steps as verl's do (``verl/workers/engine/base.py``, 0.9.1)."""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from stacks import plugin
from trainers import llama

from gradreg_optim import GradRegOptimizer

SETTINGS = {"grad_reg_strength": "5e-2", "grad_reg_eps": 1e-2, "grad_reg_g1_clip": 0, "grad_reg_g2_clip": 0}
MODEL = llama()
BATCH = [torch.tensor([[3, 4, 5, 6], [7, 8, 9, 3]]), torch.tensor([[5, 5, 8, 9]])]


@dataclass
class OptimizerConfig:
    lr: float = 1e-2
    override_optimizer_config: Any = None


def build_optimizer(parameters, config):
    return torch.optim.AdamW(parameters, lr=config.lr, **(config.override_optimizer_config or {}))


def loss_of(model, ids):
    return model(input_ids=ids, labels=ids).loss / len(BATCH)


@pytest.fixture
def engine_of(monkeypatch):
    """An engine with ``optim.override_optimizer_config``, after ``model.external_lib`` has been imported."""

    class BaseEngine:
        def train_batch(self, data, loss_function):
            self.optimizer_zero_grad()
            outputs = self.forward_backward_batch(data, loss_function, forward_only=False)
            outputs["metrics"]["grad_norm"] = self.optimizer_step()
            return outputs

    class FSDPEngine(BaseEngine):
        def __init__(self, override=None):
            self.module, self.scaler, self.passes = copy.deepcopy(MODEL), None, 0
            self.optimizer_config = OptimizerConfig(override_optimizer_config=override)
            self.optimizer = self._build_optimizer(self.module)

        def _build_optimizer(self, module):
            return build_optimizer(module.parameters(), self.optimizer_config)

        def optimizer_zero_grad(self):
            self.optimizer.zero_grad()

        def forward_backward_batch(self, data, loss_function, forward_only=False):
            self.passes += 1
            losses = [loss_function(self.module, ids) for ids in data]
            for loss in [] if forward_only else losses:
                loss.backward()
            return {"metrics": {"loss": [loss.item() for loss in losses]}}

        def optimizer_step(self):
            norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
            self.optimizer.step()
            return norm.item()

    class WithHead(FSDPEngine):
        """The engines that verl builds are subclasses, registered before or after the plugin is imported."""

    plugin(
        monkeypatch,
        "verl",
        verl__workers__config__optimizer={"build_optimizer": build_optimizer},
        verl__workers__engine__base={"BaseEngine": BaseEngine},
        verl__workers__engine__fsdp__transformer_impl={"FSDPEngine": FSDPEngine},
    )
    return WithHead


def by_hand(steps):
    """The same steps with ``passes()``; yields the losses of the first pass and the norm of the combined gradient."""
    model = copy.deepcopy(MODEL)
    settings = {
        "strength": 5e-2,
        "eps": 1e-2,
        "g1_clip": None,
        "g2_clip": None,
        "exclude": ("embed_tokens", "lm_head"),
    }
    optimizer = GradRegOptimizer(build_optimizer(model.parameters(), OptimizerConfig()), **settings, model=model)
    for _ in range(steps):
        losses = []
        for _ in optimizer.passes():
            optimizer.zero_grad()
            for ids in BATCH:
                loss = loss_of(model, ids)
                loss.backward()
                losses.append(loss.item())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        optimizer.step()
        yield model, losses[: len(BATCH)], norm


def test_the_engine_takes_regularized_steps(engine_of):
    """Weights, losses and norm are those of a loop over ``passes()``, bit for bit; metrics are the first pass's and ours."""
    engine = engine_of({"weight_decay": 0.01, **SETTINGS})
    assert isinstance(engine.optimizer, GradRegOptimizer)
    for model, losses, norm in by_hand(2):
        metrics = engine.train_batch(BATCH, loss_of)["metrics"]
        assert metrics["loss"] == losses
        assert metrics["grad_norm"] == norm
        assert metrics["grad_reg/strength"] == [5e-2]
        assert metrics["grad_reg/penalty_ratio"][0] > 0
        assert all(a.equal(b) for a, b in zip(engine.module.parameters(), model.parameters(), strict=True))
    assert engine.optimizer.step_count == 2
    plain = engine_of()
    for _ in range(2):
        plain.train_batch(BATCH, loss_of)
    assert any(not a.equal(b) for a, b in zip(engine.module.parameters(), plain.module.parameters(), strict=True))


def test_engines_without_settings_are_left_alone(engine_of):
    """The critic of a regularized actor, for example."""
    engine = engine_of({"weight_decay": 0.0})
    assert type(engine.optimizer) is torch.optim.AdamW
    assert set(engine.train_batch(BATCH, loss_of)["metrics"]) == {"loss", "grad_norm"}
    assert engine.passes == 1


def test_forward_only_runs_once(engine_of):
    """Validation and log-probabilities cost one forward, and leave no gradient."""
    engine = engine_of(SETTINGS)
    engine.forward_backward_batch(BATCH, loss_function=loss_of, forward_only=True)
    assert engine.passes == 1
    assert all(parameter.grad is None for parameter in engine.module.parameters())


def test_what_is_excluded(engine_of):
    """Embeddings and head, and patterns beside them, which needs the names that verl does not give to optimizers."""
    names = [name for name, _ in MODEL.named_parameters()]

    def excluded(**more):
        [group] = engine_of({**SETTINGS, **more}).optimizer.param_groups
        return [names[position] for position in group["gradreg_excluded"]]

    assert excluded() == ["model.embed_tokens.weight", "lm_head.weight"]
    assert excluded(grad_reg_exclude=["model.norm"]) == [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    ]
    assert excluded(grad_reg_exclude=["none"]) == []


def test_gradients_of_two_batches_are_refused(engine_of):
    """A second pass over the last of them would be no pass over both."""
    engine = engine_of(SETTINGS)
    engine.forward_backward_batch(BATCH[:1], loss_of)
    with pytest.raises(RuntimeError, match=r"called twice.*micro-batches"):
        engine.forward_backward_batch(BATCH[1:], loss_of)


def test_engines_that_pass_over_the_settings_are_refused(engine_of):
    """An engine that builds its optimizer in its own way would train without the penalty, and nobody would know."""

    class Other(engine_of):
        def _build_optimizer(self, module):
            return build_optimizer(module.parameters(), OptimizerConfig())

    Other({"weight_decay": 0.0}).train_batch(BATCH, loss_of)
    engine = Other(SETTINGS)
    with pytest.raises(RuntimeError, match=r"Other built its optimizer without.*strategy=fsdp2"):
        engine.train_batch(BATCH, loss_of)
    assert engine.passes == 0


def test_mistakes_are_refused(engine_of):
    """When the engine is built; without ``external_lib`` the optimizer inside does not know the keys."""
    with pytest.raises(ValueError, match="Did you mean 'grad_reg_strength'"):
        engine_of({"grad_reg_strenght": 1.0})
    with pytest.raises(TypeError, match="grad_reg_strength"):
        build_optimizer(MODEL.parameters(), OptimizerConfig(override_optimizer_config=SETTINGS))
