"""The ways to estimate H·d: a forward difference, and a central one."""

import math

import pytest
import torch
from problems import assert_same, closure_of, regression, unchecked, weights
from reference import combined, curvature_along, gradient_of, norm
from torch import nn

STRENGTH = 0.3


def gradients(parameters):
    return [parameter.grad.clone() for parameter in parameters]


def stepped(model, loss, **settings):
    optimizer = unchecked(torch.optim.SGD(model.parameters(), lr=0.0), strength=STRENGTH, **settings)
    closure = closure_of(optimizer, loss)
    optimizer.step(closure)
    return optimizer, closure


def errors(method, eps):
    """Distance of the estimate of H·d from the truth."""
    torch.manual_seed(0)
    model, loss = regression()
    parameters = list(model.parameters())
    d, product = curvature_along(parameters, loss)
    stepped(model, loss, method=method, eps=eps)
    found = [(grad - a) / STRENGTH for grad, a in zip(gradients(parameters), d, strict=True)]
    return norm([a - b for a, b in zip(found, product, strict=True)])


@pytest.mark.parametrize(("method", "order"), [("forward", 1), ("central", 2)])
def test_order_of_the_error(method, order):
    """Ten times shorter a step, ten or a hundred times smaller an error."""
    slope = math.log10(errors(method, 0.1) / errors(method, 0.01))
    assert slope == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("clip", [None, 0.1])
def test_central_is_its_formula(clip):
    """Three calls, at θ, θ − ε·g1 and θ + ε·g1, each side clipped; back at θ, with metrics of what was done."""
    model, loss = regression()
    parameters, before, eps = list(model.parameters()), weights(model), 0.05
    gradient_at = gradient_of(parameters, loss)
    expected = combined(gradient_at, strength=STRENGTH, eps=eps, method="central", g2_clip=clip)
    length = norm(gradient_at(gradient_at(), eps))
    optimizer, closure = stepped(model, loss, method="central", eps=eps, g1_clip=None, g2_clip=clip)
    torch.testing.assert_close(gradients(parameters), expected, rtol=1e-10, atol=1e-13)
    assert_same(weights(model), before)
    assert closure.calls == 3
    assert float(optimizer.metrics["g2_norm"]) == pytest.approx(length)
    assert bool(optimizer.metrics["g2_clipped"]) == (clip is not None)
    assert float(optimizer.metrics["perturbation_fidelity"]) == pytest.approx(1.0)


def test_central_with_a_parameter_that_only_one_point_reaches():
    """No gradient is a gradient of 0."""
    used, rare = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    start = used.detach().clone()

    def loss():  # beyond θ, where the gradient leads
        return used.square().sum() + (rare.sum() if used.detach().sum() > start.sum() else 0.0)

    optimizer = unchecked(torch.optim.SGD([used, rare], lr=0.0), strength=STRENGTH, eps=0.5, method="central")
    optimizer.step(closure_of(optimizer, loss))
    assert_same(rare.grad, torch.full((2,), STRENGTH / 0.5 * 0.5))
    torch.testing.assert_close(used.grad, torch.full((2,), 2 + STRENGTH * 2 * 2.0))


@pytest.mark.parametrize(("call", "value"), [(2, math.nan), (3, math.inf)])
def test_central_without_a_finite_side(call, value):
    """The penalty is left out and counted."""
    model, loss = regression()
    optimizer = unchecked(torch.optim.SGD(model.parameters(), lr=0.0), method="central")
    closure = closure_of(optimizer, loss)

    def failing():
        found = closure()
        if closure.calls == call:
            next(model.parameters()).grad.fill_(value)
        return found

    optimizer.step(failing)
    assert_same(gradients(model.parameters()), closure.gradients[0])
    assert optimizer.metrics["skipped"] == 1
