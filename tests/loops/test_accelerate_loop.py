"""Accelerate in a loop of your own: what ``accelerator.prepare`` returns takes the usual closure.

    accelerator = Accelerator()                       # the closure accumulates: leave its count at 1
    model, optimizer, loader = accelerator.prepare(model, GradRegOptimizer(base), loader)

    def closure():
        optimizer.zero_grad()
        for i, batch in enumerate(window):            # the micro-batches of one step
            syncs = i == len(window) - 1              # under DDP, gradients are averaged over ranks once
            with nullcontext() if syncs else accelerator.no_sync(model):
                accelerator.backward(loss_of(model, batch) / len(window))

    optimizer.step(closure)                           # returns None; the wrapper is optimizer.optimizer

``Accelerator(gradient_accumulation_steps=N)`` with ``accelerator.accumulate(model)`` around each micro-batch
*inside* the closure works too, for windows of exactly N. A closure inside ``accumulate`` does not: Accelerate
calls it for the last micro-batch of a window alone, whatever the optimizer. Under an fp16 scaler the
optimizer stays out of ``prepare``: Accelerate hands closures to ``GradScaler.step``, which unscales before
any of them has run.
"""

import os
from contextlib import nullcontext

import pytest
import torch
from problems import assert_same, regression, twin_of, weights
from reference import Reference

pytest.importorskip("accelerate", reason="Accelerate comes with the extra [trl]")

import accelerate
from accelerate.state import AcceleratorState, GradientState

from gradreg_optim import GradRegOptimizer

SETTINGS = {"strength": 0.125, "eps": 0.0625, "g1_clip": None, "g2_clip": None}
SIZES = {1: [1, 1, 1], 2: [2, 2, 2], "uneven": [2, 2, 1]}
"""Micro-batches in each of three windows."""


@pytest.fixture(autouse=True)
def _no_other_accelerator(monkeypatch):
    """Accelerate's state belongs to the process: leave none to the next test, in the environment neither."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def data(sizes):
    """Windows of micro-batches."""
    return [[(torch.randn(5, 4).double(), torch.randn(5, 2).double()) for _ in range(size)] for size in sizes]


def error(model, batch):
    inputs, targets = batch
    return (model(inputs) - targets).square().mean()


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def referenced(model, windows, **settings):
    """The weights after each window, by the slow twin of the method: mean over a window's micro-batches, no Accelerate."""
    model, _ = twin_of(model, None)
    base, after = sgd(model), []
    reference = Reference(base, **{**SETTINGS, **settings})
    for window in windows:

        def closure(window=window):
            base.zero_grad()
            loss = sum(error(model, batch) for batch in window) / len(window)
            loss.backward()
            return loss

        reference.step(closure)
        after.append(weights(model))
    return after, reference


def accumulating(accelerator, model, optimizer, window, losses):
    """A closure that lets Accelerate count the micro-batches and divide by their number."""

    def closure():
        optimizer.zero_grad()
        for batch in window:
            with accelerator.accumulate(model):
                loss = error(model, batch)
                losses.append(loss.item())
                accelerator.backward(loss)

    return closure


def synchronizing(accelerator, model, optimizer, window, losses):
    """A closure that does so itself."""

    def closure():
        optimizer.zero_grad()
        for i, batch in enumerate(window):
            with nullcontext() if i == len(window) - 1 else accelerator.no_sync(model):
                loss = error(model, batch)
                losses.append(loss.item())
                accelerator.backward(loss / len(window))

    return closure


@pytest.mark.parametrize(
    ("closure_of", "accumulation"),
    [(accumulating, 1), (accumulating, 2), (synchronizing, 1), (synchronizing, 2), (synchronizing, "uneven")],
)
def test_prepared_optimizer_takes_closures(closure_of, accumulation):
    """Every step is the method's on the mean of its micro-batches, each of which runs twice."""
    model, windows = regression()[0], data(SIZES[accumulation])
    expected, reference = referenced(model, windows)
    count = accumulation if closure_of is accumulating else 1
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=count)
    model, optimizer = accelerator.prepare(model, GradRegOptimizer(sgd(model), check_every=0, **SETTINGS))
    losses = []
    for window, after in zip(windows, expected, strict=True):
        optimizer.step(closure_of(accelerator, model, optimizer, window, losses))
        # float64 sums in another order.
        torch.testing.assert_close(weights(model), after, rtol=1e-11, atol=1e-12)
    assert len(losses) == 2 * sum(map(len, windows))
    metrics = optimizer.optimizer.metrics
    assert float(metrics["penalty_ratio"]) == pytest.approx(reference.metrics["penalty_ratio"], rel=1e-9)
    assert float(metrics["penalty_ratio"]) > 0.01  # the penalty is there to be missed


def test_scheduler_steps_once_a_step():
    """A prepared LR scheduler sees one step for each closure."""
    model = regression()[0]
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    base = sgd(model)
    optimizer = GradRegOptimizer(base, check_every=0, **SETTINGS)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    rates = []
    for window in data([2, 2, 2]):
        optimizer.step(accumulating(accelerator, model, optimizer, window, []))
        scheduler.step()
        rates.append(base.param_groups[0]["lr"])
    assert rates == [0.05, 0.025, 0.0125]


def test_clipping_the_combined_gradient():
    """Whatever must see the combined gradient goes into a pre-hook of the wrapped optimizer's step."""
    model, windows = regression()[0], data([1, 1])
    accelerator = accelerate.Accelerator(cpu=True)
    base, norms = sgd(model), []
    base.register_step_pre_hook(lambda *_: norms.append(accelerator.clip_grad_norm_(model.parameters(), 1e-3).item()))
    (plain,), _ = referenced(model, windows[:1])
    start = weights(model)
    model, optimizer = accelerator.prepare(model, GradRegOptimizer(base, check_every=0, **SETTINGS))
    optimizer.step(synchronizing(accelerator, model, optimizer, windows[0], []))
    combined = torch.cat([((a - b) / 0.1).flatten() for a, b in zip(start, plain, strict=True)])  # rate 0.1
    moved = torch.cat([(a - b).flatten() for a, b in zip(start, weights(model), strict=True)])
    assert norms == [pytest.approx(combined.norm().item(), rel=1e-9)]
    # Clip adds 1e-6.
    torch.testing.assert_close(moved, 0.1 * combined * 1e-3 / combined.norm(), rtol=1e-4, atol=0)


SCALE = 2.0**10


def with_scaler(**settings):
    """An accelerator with the scaler of fp16 training, which it refuses to make for a CPU."""
    accelerator = accelerate.Accelerator(cpu=True, **settings)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=2)
    return accelerator


@pytest.mark.parametrize("accumulation", [1, 2])
def test_scaled_loop_is_the_unscaled_one(accumulation):
    """With ``scaler=accelerator.scaler`` and left out of prepare(), a step under a scaler is the method's."""
    model, windows = regression()[0], data(SIZES[accumulation])
    expected, _ = referenced(model, windows)
    accelerator = with_scaler(gradient_accumulation_steps=accumulation)
    optimizer = GradRegOptimizer(sgd(model), scaler=accelerator.scaler, **SETTINGS)
    model = accelerator.prepare(model)
    for window, after in zip(windows, expected, strict=True):
        optimizer.step(accumulating(accelerator, model, optimizer, window, []))
        accelerator.scaler.update()
        torch.testing.assert_close(weights(model), after, rtol=1e-11, atol=1e-12)  # as without a scaler
    assert accelerator.scaler.get_scale() == 2 * SCALE  # it has seen every step


def test_overflow_in_a_scaled_loop_skips_the_step():
    """A scale that the gradients do not fit under moves no weight, and comes down."""
    model = regression(dtype=torch.float32)[0]
    accelerator = with_scaler()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    optimizer = GradRegOptimizer(sgd(model), scaler=accelerator.scaler, **SETTINGS)
    model, start = accelerator.prepare(model), weights(model)
    (window,) = data([1])
    window = [(inputs.float(), 1000 * targets.float()) for inputs, targets in window]
    optimizer.step(accumulating(accelerator, model, optimizer, window, []))
    accelerator.scaler.update()
    assert_same(weights(model), start)
    assert optimizer.metrics["skipped"] == 1
    assert accelerator.scaler.get_scale() == 2.0**126


@pytest.mark.parametrize("given", [False, True], ids=["", "scaler="])
def test_prepared_under_a_scaler_is_refused(given):
    """Accelerate's GradScaler.step wants gradients before the closure has made any: it raises, and nothing has moved."""
    model = regression()[0]
    accelerator = with_scaler()
    optimizer = GradRegOptimizer(sgd(model), scaler=accelerator.scaler if given else None, **SETTINGS)
    model, optimizer = accelerator.prepare(model, optimizer)
    start, losses = weights(model), []
    for _ in range(2):  # the second time, the scale exists
        with pytest.raises(AssertionError, match=r"_scale is None|No inf checks were recorded"):
            optimizer.step(accumulating(accelerator, model, optimizer, data([1])[0], losses))
        accelerator.scaler.scale(torch.ones(1))
    assert losses == []
    assert_same(weights(model), start)
