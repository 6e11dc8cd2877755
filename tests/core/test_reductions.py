"""What the method becomes at particular settings: nothing, SAM, the gradient-norm penalty of Zhao et al."""

import copy

import pytest
import pytorch_optimizer
import torch
from problems import (
    DENSE_OPTIMIZERS,
    Quadratic,
    assert_same,
    closure_of,
    regression,
    twin_of,
    unchecked,
    weights,
)
from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """The name of every operation that reaches torch, the marks of the profiler aside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "profiler":
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("optimizer_class", "settings"),
    [
        *((optimizer_class, {"strength": 0.0}) for optimizer_class in DENSE_OPTIMIZERS),
        (torch.optim.AdamW, {"warmup_steps": 9}),
        (torch.optim.AdamW, {"schedule": lambda step: 0.0}),
    ],
)
def test_strength_zero_is_the_base_optimizer(optimizer_class, settings):
    """The same bits in weights and state, one backward, and the very same operations: nothing else is computed."""
    loss = Quadratic()
    other = copy.deepcopy(loss)
    base = optimizer_class([other.weight])
    inner = optimizer_class([loss.weight])
    optimizer = unchecked(inner, **settings)
    for _ in range(3):
        closure, bare_closure = closure_of(optimizer, loss), closure_of(base, other)
        with Operations() as wrapped:
            value = optimizer.step(closure)
        with Operations() as bare:
            expected = base.step(bare_closure)
        assert closure.calls == 1
        assert wrapped.names == bare.names
        assert_same(value, expected)
        assert_same(loss.weight.detach(), other.weight.detach())
        assert_same(list(inner.state[loss.weight].values()), list(base.state[other.weight].values()))


class Sam:
    """Un-normalised SAM, written down independently: the base optimizer at θ with the gradient at θ + ρ·g."""

    def __init__(self, optimizer, rho):
        self.optimizer, self.rho = optimizer, rho

    def step(self, loss):
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        start = [parameter.detach().clone() for parameter in parameters]
        gradients = torch.autograd.grad(loss(), parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.add_(gradient, alpha=self.rho)
        gradients = torch.autograd.grad(loss(), parameters)
        with torch.no_grad():
            for parameter, gradient, value in zip(parameters, gradients, start, strict=True):
                parameter.copy_(value)
                parameter.grad = gradient
        self.optimizer.step()


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adafactor])
def test_strength_equal_to_eps_is_sam(optimizer_class):
    """γ = ε leaves exactly g2, and ten steps are those of un-normalised SAM, bit for bit."""
    model, loss = regression(dtype=torch.float32)
    other, other_loss = twin_of(model, loss)
    optimizer = unchecked(optimizer_class(model.parameters(), lr=0.05), strength=0.3, eps=0.3, g1_clip=None, g2_clip=None)
    sam = Sam(optimizer_class(other.parameters(), lr=0.05), rho=0.3)
    for _ in range(10):
        closure = closure_of(optimizer, loss)
        optimizer.step(closure)
        sam.step(other_loss)
        assert_same([parameter.grad for parameter in model.parameters()], closure.gradients[1])
        assert_same(weights(model), weights(other))


def test_radius_form_is_sam_of_pytorch_optimizer():
    """With a radius, and γ set to the ε that it implies, the steps are those of SAM as published."""
    model, loss = regression()
    other, other_loss = twin_of(model, loss)
    radius = 0.05
    optimizer = unchecked(
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        strength=1.0,
        radius=radius,
        g1_clip=None,
        g2_clip=None,
    )
    sam = pytorch_optimizer.SAM(other.parameters(), torch.optim.SGD, rho=radius, lr=0.1, momentum=0.9)
    for _ in range(10):
        gradients = torch.autograd.grad(loss(), list(model.parameters()))
        length = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
        optimizer.param_groups[0]["gradreg_strength"] = radius / length
        optimizer.step(closure_of(optimizer, loss))
        closure = closure_of(sam, other_loss)
        closure()
        sam.step(closure)
        # SAM sums ‖g1‖ in float32.
        torch.testing.assert_close(weights(model), weights(other), rtol=0, atol=1e-7)


def test_radius_form_is_the_gradient_norm_penalty():
    """(1−α)·g1 + α·g2 with a step of length ρ (Zhao et al. 2022) is a radius with α = γ/ε."""
    model, loss = regression()
    parameters = list(model.parameters())
    g1 = torch.autograd.grad(loss(), parameters)
    length = torch.cat([gradient.flatten() for gradient in g1]).norm().item()
    radius, alpha = 0.1, 0.7
    other, other_loss = twin_of(model, loss)
    with torch.no_grad():
        for parameter, gradient in zip(other.parameters(), g1, strict=True):
            parameter += radius * gradient / length
    g2 = torch.autograd.grad(other_loss(), list(other.parameters()))
    expected = [(1 - alpha) * a + alpha * b for a, b in zip(g1, g2, strict=True)]
    optimizer = unchecked(
        torch.optim.SGD(parameters, lr=0.1),
        strength=alpha * radius / length,
        radius=radius,
        g1_clip=None,
        g2_clip=None,
    )
    optimizer.step(closure_of(optimizer, loss))
    actual = [parameter.grad for parameter in parameters]
    # The order of a few float64 operations.
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


SWITCHES = {
    "strength": {"strength": 0.2},
    "eps": {"eps": 0.5},
    "radius": {"radius": 0.5},
    "warmup_steps": {"warmup_steps": 1},
    "schedule": {"schedule": "linear", "schedule_steps": 10},
    "g1_clip": {"g1_clip": 1e-2},
    "g2_clip": {"g2_clip": 1e-2},
    "max_penalty_ratio": {"max_penalty_ratio": 1e-3},
    "exclude": {"exclude": "2."},
}


@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES)
def test_every_switch_changes_something(switch):
    """No setting is ignored: two steps with it end elsewhere than two steps without it."""
    model, loss = regression()
    other, other_loss = twin_of(model, loss)
    for settings, current, its_loss in (({}, model, loss), (switch, other, other_loss)):
        inner = torch.optim.SGD(current.named_parameters(), lr=0.1)
        optimizer = unchecked(inner, **{"strength": 0.1, **settings})
        for _ in range(2):
            optimizer.step(closure_of(optimizer, its_loss))
    differences = [(a - b).abs().max().item() for a, b in zip(weights(model), weights(other), strict=True)]
    assert max(differences) > 1e-6  # far above rounding


def test_nothing_excluded_is_the_default_of_the_bare_wrapper():
    """``exclude="none"`` leaves nothing out, and is no pattern that would have to match."""
    results = []
    for exclude in ((), "none", ("none",), None):
        torch.manual_seed(0)
        model, loss = regression()
        optimizer = unchecked(torch.optim.SGD(model.parameters(), lr=0.1), strength=0.1, exclude=exclude)
        optimizer.step(closure_of(optimizer, loss))
        results.append(weights(model))
    for other in results[1:]:
        assert_same(other, results[0])
