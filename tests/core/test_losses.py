"""Closures that are not one function of the weights are noticed in the first step; those that are run twice."""

import itertools
import math

import pytest
import torch
from problems import Quadratic, assert_same, closure_of, regression, unchecked, weights
from torch import nn

from gradreg_optim import GradRegOptimizer

PASSES = {"forward": 2, "central": 3}


class Drawn:
    """A linear model whose loss takes something of its own each time: what, is up to the subclass."""

    def __init__(self, dtype=torch.float32):
        torch.manual_seed(0)
        self.model = nn.Linear(6, 1).to(dtype)
        self.inputs, self.targets = torch.randn(32, 6, dtype=dtype), torch.randn(32, 1, dtype=dtype)
        self.generator = torch.Generator().manual_seed(0)
        self.batches = iter(torch.randn(99, 32, 6, dtype=dtype))

    def of(self, inputs):
        return (self.model(inputs) - self.targets).square().mean()


class OwnGenerator(Drawn):
    def __call__(self):
        return self.of(self.inputs * (torch.rand(32, 6, generator=self.generator) > 0.1))


class NextBatch(Drawn):
    def __call__(self):
        return self.of(next(self.batches))


class OwnCounter(Drawn):
    """Anneals a coefficient at each call."""

    def __init__(self, dtype=torch.float32):
        super().__init__(dtype)
        self.calls = itertools.count(1)

    def __call__(self):
        return self.of(self.inputs) / next(self.calls)


def by_closure(optimizer, loss):
    optimizer.step(closure_of(optimizer, loss))


def by_closure_that_returns_nothing(optimizer, loss):
    closure = closure_of(optimizer, loss)
    optimizer.step(lambda: closure() and None)


def by_loop(optimizer, loss):
    for _ in optimizer.passes():
        optimizer.zero_grad()
        loss().backward()
    optimizer.step()


def without_backward(optimizer, loss):
    def closure():
        value = loss()
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for parameter, gradient in zip(parameters, torch.autograd.grad(value, parameters), strict=True):
            parameter.grad = gradient
        return value.item()

    optimizer.step(closure)


DRIVERS = [by_closure, by_closure_that_returns_nothing, by_loop, without_backward]
CASES = [(kind, "forward", by_closure) for kind in (NextBatch, OwnCounter)]
CASES += [(OwnGenerator, method, driver) for method, driver in itertools.product(PASSES, DRIVERS)]


@pytest.mark.parametrize(("kind", "method", "driver"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_a_loss_that_is_another_one_at_each_call_is_refused(kind, method, driver):
    """In the first step, whatever drives it; the weights are whole, nothing is counted."""
    loss = kind()
    before = weights(loss.model)
    optimizer = unchecked(torch.optim.SGD(loss.model.parameters(), lr=0.1), strength=1e-2, method=method)
    with pytest.raises(RuntimeError, match=r"not a function of the weights: it was .* and .* when that was repeated"):
        driver(optimizer, loss)
    assert_same(weights(loss.model), before)
    assert optimizer.step_count == 0


@pytest.mark.parametrize("method", PASSES)
def test_a_loss_that_begins_to_draw_later_is_told(method):
    """Its loss_check is far from 1: that step goes without penalty and is counted, and the user is told once."""
    loss = OwnGenerator()
    optimizer = unchecked(torch.optim.SGD(loss.model.parameters(), lr=0.1), strength=1e-2, method=method)
    optimizer.step(closure_of(optimizer, lambda: loss.of(loss.inputs)))
    # The spacing of a float32 loss.
    assert float(optimizer.metrics["loss_check"]) == pytest.approx(1.0, abs=0.01)
    closure = closure_of(optimizer, loss)
    with pytest.warns(UserWarning, match="loss_check is off by"):
        optimizer.step(closure)
    assert optimizer.metrics["skipped"] == 1
    assert_same([p.grad for p in loss.model.parameters()], closure.gradients[0])
    optimizer.step(closure_of(optimizer, loss))
    assert optimizer.metrics["skipped"] == 2


@pytest.mark.parametrize("settings", [{}, {"g1_clip": 1e-2}, {"method": "central"}, {"radius": 0.5}], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_the_trapezoid_rule_is_exact_on_a_quadratic(settings, scale):
    """``loss_check`` is 1 at any length of the step, whatever is clipped or scaled."""
    quadratic = Quadratic()
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1)
    eps = {} if "radius" in settings else {"eps": 0.5}
    optimizer = unchecked(torch.optim.SGD([quadratic.weight], lr=0.0), scaler=scaler, **eps, **settings)
    for _ in range(2):
        optimizer.step(closure_of(optimizer, quadratic, scaler.scale))
        scaler.update()
        assert float(optimizer.metrics["loss_check"]) == pytest.approx(1.0, rel=1e-9)


def calls_of(loss, parameters, steps=2, **settings):
    optimizer = unchecked(torch.optim.SGD(parameters, lr=1e-3), **settings)
    closure = closure_of(optimizer, loss)
    for _ in range(steps):
        optimizer.step(closure)
    return closure.calls / steps


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("method", "eps"), [("forward", 1e-6), ("forward", 1e-3), ("forward", 0.1), ("central", 1e-3)])
def test_a_function_is_called_no_more_often_than_promised(method, dtype, eps):
    """Dropout masks are drawn again; the change of the loss is rounding, slope or curvature."""
    model, loss = regression(nn.Dropout(0.5), nn.BatchNorm1d(6), dtype=dtype)
    settings = {"method": method, "check_every": 0, "strength": 0.01, "eps": eps}
    assert calls_of(loss, model.parameters(), **settings) == PASSES[method]


def test_curvature_within_a_long_step_is_no_suspicion():
    """On a quadratic the change of the loss is known at any length of the step."""
    quadratic = Quadratic()
    assert calls_of(quadratic, [quadratic.weight], eps=5.0, g1_clip=None, g2_clip=None) == 2


def test_a_suspicion_that_is_not_confirmed_changes_nothing():
    """A loss that jumps within the step is computed once more, in the first step alone; the update is the formula's."""
    w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))

    def loss():
        return w.square().sum() + 1e3 * (w.detach().sum() > 3).double()

    optimizer = unchecked(torch.optim.SGD([w], lr=1.0), strength=0.1, eps=0.5)
    closure = closure_of(optimizer, loss)
    optimizer.step(closure)
    assert closure.calls == 3
    assert_same(closure.gradients[2], closure.gradients[1])
    torch.testing.assert_close(w.detach(), -1.4 * torch.tensor([1.0, 2.0]).double())  # w − (2w + 0.1·2·2w)
    optimizer.step(closure)
    assert closure.calls == 5


VALUES = {
    "None": lambda loss: None,
    "a number": lambda loss: 0.25,
    "in another scale": lambda loss: 1000 * loss.detach(),
    "not scalar": lambda loss: loss.detach() * torch.arange(3),
    "of one micro-batch": lambda loss: torch.rand(()),
    "a dict": lambda loss: {"loss": loss},
    "NaN": lambda loss: math.nan,
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_what_a_closure_returns_is_its_own_affair(value):
    """What is compared is what it differentiates."""
    model, loss = regression()
    optimizer = unchecked(torch.optim.SGD(model.parameters(), lr=0.1))
    closure = closure_of(optimizer, loss)
    optimizer.step(lambda: value(closure()))
    assert closure.calls == 2


def test_losses_under_a_scaler():
    """The loss is scaled as its gradient is: a function is called twice, another one is refused."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    model, loss = regression()
    optimizer = unchecked(torch.optim.SGD(model.parameters(), lr=0.1), scaler=scaler)
    closure = closure_of(optimizer, loss, scaler.scale)
    optimizer.step(closure)
    assert closure.calls == 2
    drawn = OwnGenerator()
    optimizer = GradRegOptimizer(torch.optim.SGD(drawn.model.parameters(), lr=0.1), scaler=scaler)
    with pytest.raises(RuntimeError, match="not a function of the weights"):
        optimizer.step(closure_of(optimizer, drawn, scaler.scale))


def test_backward_with_gradients_of_one_s_own():
    """A backward through several roots, each with a factor: their weighted sum is the loss."""
    model, _ = regression()
    inputs, factor = torch.randn(5, 4).double(), torch.randn(5, 2).double()
    optimizer = unchecked(torch.optim.SGD(model.parameters(), lr=0.1))
    calls = []

    def closure():
        optimizer.zero_grad()
        outputs = model(inputs)
        torch.autograd.backward([outputs, outputs.square().sum()], [factor, None])
        calls.append(1)

    optimizer.step(closure)
    assert len(calls) == 2
