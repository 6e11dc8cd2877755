"""Lightning and Fabric: both pass a closure to ``optimizer.step``, which is all that the wrapper needs.

In a LightningModule, ``configure_optimizers`` returns the wrapper; its figures are in ``self.optimizers().metrics``.
``training_step`` runs twice a step, the second time at θ'. What ``self.log`` is told there counts as well, unless the
module skips it:

    def optimizer_step(self, *args, **kwargs):
        self.at_theta = True
        super().optimizer_step(*args, **kwargs)

    def training_step(self, batch, batch_idx):
        loss = ...
        if self.at_theta:                     # False from the second call on
            self.log("train_loss", loss)
        self.at_theta = False
        return loss

``gradient_clip_val`` acts inside Lightning's closure; it is held back for the combined gradient. With
``accumulate_grad_batches`` the closure covers the last micro-batch of a window alone; accumulation needs manual
optimization, with a closure over all of them (``Module.training_step`` below, ``manual``). An fp16 scaler does not get
along with closures either ("16-mixed"); "bf16-mixed" has none.
"""

import logging

import pytest
import torch
from problems import assert_same, regression, twin_of, weights
from reference import Reference

pytest.importorskip("lightning", reason="Lightning comes with the extra [dev]")

import lightning
from lightning.fabric import plugins as fabric_plugins
from lightning.pytorch import plugins
from torch.utils.data import DataLoader

from gradreg_optim import GradRegOptimizer

pytestmark = [
    # Advice about workers and logging intervals, which tiny runs do without.
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    # Lightning 2.6 asks torch 2.13's trees by the name of a class that goes. Goes when Lightning has followed.
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

SETTINGS = {"strength": 0.125, "eps": 0.0625, "g1_clip": None, "g2_clip": None}
QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
    "devices": 1,
    "max_epochs": 1,
}
STEPS = 3


def data(accumulation=1):
    return [(torch.randn(5, 4).double(), torch.randn(5, 2).double()) for _ in range(STEPS * accumulation)]


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def error(model, batch):
    inputs, targets = batch
    return (model(inputs) - targets).square().mean()


def referenced(model, batches, accumulation=1, clip=None, **settings):
    """The weights in the end and the losses at θ, by the slow twin of the method and without Lightning."""
    model, _ = twin_of(model, None)
    base, losses = sgd(model), []
    scheduler = torch.optim.lr_scheduler.StepLR(base, step_size=1, gamma=0.5)
    if clip is not None:

        def clip_combined(*_):
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)

        base.register_step_pre_hook(clip_combined)
    reference = Reference(base, **{**SETTINGS, **settings})
    for first in range(0, len(batches), accumulation):

        def closure(window=batches[first : first + accumulation]):
            base.zero_grad()
            loss = sum(error(model, batch) for batch in window) / len(window)
            loss.backward()
            return loss

        losses.append(reference.step(closure).item())
        scheduler.step()
    return weights(model), losses


class Module(lightning.LightningModule):
    """Halves its rate after each step; ``manual`` is the number of micro-batches in a window of manual optimization."""

    def __init__(self, net, manual=None, careful=False):
        super().__init__()
        self.net, self.losses, self.careful, self.at_theta, self.window = net, [], careful, True, []
        self.manual, self.automatic_optimization = manual, manual is None

    def configure_optimizers(self):
        optimizer = GradRegOptimizer(sgd(self.net), model=self.net, check_every=0, **SETTINGS)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def optimizer_step(self, *args, **kwargs):
        self.at_theta = True
        super().optimizer_step(*args, **kwargs)

    def training_step(self, batch, batch_idx):
        if self.manual is not None:
            self.window.append(batch)
            if len(self.window) == self.manual:
                self.step_over(self.window)
                self.window = []
            return None
        loss = error(self.net, batch)
        self.losses.append(loss.item())
        if self.at_theta or not self.careful:
            self.log("loss", loss, on_step=False, on_epoch=True, batch_size=1)
        self.at_theta = False
        return loss

    def step_over(self, window):
        optimizer = self.optimizers()

        def closure():
            optimizer.zero_grad()
            for batch in window:
                loss = error(self.net, batch)
                self.losses.append(loss.item())
                self.manual_backward(loss / len(window))
            return loss

        optimizer.step(closure)
        self.lr_schedulers().step()


def fitted(module, batches, **arguments):
    trainer = lightning.Trainer(**{**QUIET, **arguments})
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return trainer


@pytest.mark.parametrize("manual", [None, 1, 2], ids=["automatic", "manual", "manual accumulation"])
def test_fits_by_the_method(manual):
    """Weights, step count and LR schedule are the method's, with training_step's loss taken twice a step."""
    net, batches = regression()[0], data(manual or 1)
    expected, losses = referenced(net, batches, manual or 1)
    module = Module(net, manual)
    trainer = fitted(module, batches)
    torch.testing.assert_close(weights(net), expected, rtol=1e-11, atol=1e-12)  # float64 sums in another order
    assert len(module.losses) == 2 * len(batches)
    assert trainer.global_step == STEPS
    optimizer = module.optimizers()
    assert (optimizer.step_count, optimizer.param_groups[0]["lr"]) == (STEPS, 0.1 * 0.5**STEPS)
    assert float(optimizer.metrics["penalty_ratio"]) > 0.01  # the penalty is there to be missed
    if manual is None:
        assert module.losses[::2] == pytest.approx(losses, rel=1e-11)


@pytest.mark.parametrize("careful", [False, True])
def test_logged_values_are_those_at_theta_if_the_module_says_so(careful):
    """By itself, Lightning averages the losses of both passes; skipped at θ', the loss that is logged is the plain one."""
    net, batches = regression()[0], data()
    _, losses = referenced(net, batches)
    module = Module(net, careful=careful)
    trainer = fitted(module, batches)
    counted = losses if careful else module.losses
    assert trainer.callback_metrics["loss"].item() == pytest.approx(sum(counted) / len(counted), rel=1e-6)  # kept as float32
    assert sum(losses) / len(losses) != pytest.approx(sum(module.losses) / len(module.losses), rel=1e-3)


def test_gradient_clip_val_bounds_the_combined_gradient():
    """Lightning clips inside its closure; that is held back until both gradients are there."""
    net, batches = regression()[0], data()
    expected, _ = referenced(net, batches, clip=0.05)
    unclipped, _ = referenced(net, batches)
    fitted(Module(net), batches, gradient_clip_val=0.05)
    torch.testing.assert_close(weights(net), expected, rtol=1e-11, atol=1e-12)  # float64 sums in another order
    assert (weights(net)[0] - unclipped[0]).abs().max() > 1e-3


def test_accumulation_outside_the_closure_is_refused():
    """accumulate_grad_batches=2 would leave the first micro-batch out of the second gradient: it raises, nothing moves."""
    net, batches = regression()[0], data(2)
    start, error = weights(net), None
    try:
        fitted(Module(net), batches, accumulate_grad_batches=2)
    except RuntimeError as caught:
        error = str(caught)
    assert error is not None
    assert "micro-batches" in error
    assert_same(weights(net), start)


def test_mixed_fp16_is_refused():
    """Lightning steps without the closure under a scaler: the wrapper says what is missing, and nothing has moved."""
    net, batches = regression(dtype=torch.float32)[0], data()
    start = weights(net)
    precision = plugins.MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(RuntimeError, match="without a closure"):
        fitted(Module(net), [(x.float(), y.float()) for x, y in batches], plugins=precision)
    assert_same(weights(net), start)


# Fabric.


def fabric_step(fabric, model, optimizer, window):
    """One step over the micro-batches of ``window``; returns the loss of the last one at θ."""

    def closure():
        optimizer.zero_grad()
        for i, batch in enumerate(window):
            with fabric.no_backward_sync(model, enabled=i < len(window) - 1):
                loss = error(model, batch)
                fabric.backward(loss / len(window))
        return loss.detach()

    return optimizer.step(closure)


# "The strategy SingleDeviceStrategy does not support skipping the gradient synchronization": on one device, none is needed.
@pytest.mark.filterwarnings("ignore:.*no_backward_sync:UserWarning")
@pytest.mark.parametrize("accumulation", [1, 2])
def test_fabric_takes_closures(accumulation):
    """What ``fabric.setup`` returns takes the method's steps, knows the wrapper's figures, and returns the loss at θ."""
    model, batches = regression()[0], data(accumulation)
    expected, _ = referenced(model, batches, accumulation)
    first_loss = error(model, batches[accumulation - 1])
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    inner = GradRegOptimizer(sgd(model), model=model, check_every=0, **SETTINGS)
    wrapped, optimizer = fabric.setup(model, inner)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    losses = []
    for first in range(0, len(batches), accumulation):
        losses.append(fabric_step(fabric, wrapped, optimizer, batches[first : first + accumulation]))
        scheduler.step()
    torch.testing.assert_close(weights(model), expected, rtol=1e-11, atol=1e-12)  # float64 sums in another order
    torch.testing.assert_close(losses[0], first_loss.detach(), rtol=1e-12, atol=0)  # float64
    assert optimizer.metrics == inner.metrics
    assert float(optimizer.metrics["penalty_ratio"]) > 0.01
    assert optimizer.step_count == STEPS


def test_fabric_with_a_scaler():
    """Mixed fp16: set up, the optimizer is refused by the scaler; left alone, with ``scaler=``, it takes scaled steps."""
    model, batches = regression(dtype=torch.float32)[0], [(x.float(), y.float()) for x, y in data()]
    expected, _ = referenced(model.double(), [(x.double(), y.double()) for x, y in batches])
    model.float()
    start = weights(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    precision = fabric_plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler)
    fabric = lightning.Fabric(accelerator="cpu", devices=1, plugins=precision)
    optimizer = GradRegOptimizer(sgd(model), model=model, scaler=scaler, check_every=0, **SETTINGS)
    wrapped, given = fabric.setup(model, optimizer)
    with pytest.raises(RuntimeError, match="Closure use is not currently supported if GradScaler is enabled"):
        fabric_step(fabric, wrapped, given, batches[:1])
    assert_same(weights(model), start)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    for batch in batches:
        fabric_step(fabric, wrapped, optimizer, [batch])
        scaler.update()
        scheduler.step()
    for actual, before, wanted in zip(weights(model), start, expected, strict=True):
        moved, due = actual - before, wanted.float() - before
        assert (moved - due).norm() < 0.02 * due.norm()  # fp16 activations, whose rounding γ/ε = 2 doubles
    assert optimizer.metrics["skipped"] == 0
