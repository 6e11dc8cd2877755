"""Which precision is low is measured in the first regularized step, wherever it was chosen."""

import warnings

import pytest
import torch
from problems import closure_of
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradreg_optim import GradRegOptimizer


def problem(dtype=torch.float32):
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8)).to(dtype)
    inputs, targets = torch.randn(32, 16, dtype=dtype), torch.randn(32, 8, dtype=dtype)
    return model, inputs, targets


def under_autocast(model, inputs, targets):
    with torch.autocast("cpu", torch.bfloat16):
        return (model(inputs) - targets).square().mean()


def reentrant(model, inputs, targets):
    def inside(inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return model(inputs)

    return (checkpoint(inside, inputs.requires_grad_(), use_reentrant=True) - targets).square().mean()


def by_autograd_grad(model, inputs, targets):
    """No backward: the gradients are written by hand, and reduced in half precision on the way."""
    gradients = torch.autograd.grad((model(inputs) - targets).square().mean(), list(model.parameters()))
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient.bfloat16().float()


def as_it_is(model, inputs, targets):
    return (model(inputs) - targets).square().mean()


def found(kind, dtype=torch.float32, steps=2, **settings):
    """In which steps there was a check, and what was found of the precision."""
    model, inputs, targets = problem(dtype)
    optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), **settings)
    checked = []

    def closure():
        optimizer.zero_grad()
        loss = kind(model, inputs, targets)
        if loss is not None:
            loss.backward()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(steps):
            optimizer.step(closure)
            checked.append("self_check" in optimizer.metrics)
    return checked, optimizer.param_groups[0]["gradreg_is_low"], "radius" in optimizer.metrics


@pytest.mark.parametrize("kind", [under_autocast, reentrant, by_autograd_grad])
def test_half_precision_that_nobody_announced(kind):
    """The first step is checked, the next one is not, and the radius adapts; nothing is checked if the user says so."""
    assert found(kind) == ([True, False], True, True)
    assert found(kind, check_every=0) == ([False, False], True, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_precision_is_checked_once(dtype):
    """And keeps the published ε."""
    assert found(as_it_is, dtype, 3) == ([True, False, False], False, False)


def test_weights_in_half_precision_say_so():
    """Without a look at the gradient."""
    assert found(as_it_is, torch.bfloat16)[1:] == (True, True)


def test_later_checks():
    """Every hundredth step where precision is low, and never where it is full."""
    for kind, expected in ((under_autocast, True), (as_it_is, False)):
        model, inputs, targets = problem()
        optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.01))
        closure = closure_of(optimizer, lambda kind=kind, data=(model, inputs, targets): kind(*data))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step(closure)
            optimizer.param_groups[0]["gradreg_step"] = 100
            optimizer.step(closure)
        assert ("self_check" in optimizer.metrics) == expected
