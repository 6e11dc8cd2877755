"""Where many steps lead."""

import torch
from problems import closure_of, regression, unchecked
from reference import norm
from torch import nn


def test_flatter_minima_are_found():
    """½(xy − 1)² is minimal along a whole curve and flattest at |x| = |y|: the penalty ends closer to there."""
    curvature = {}
    for strength in (0.0, 0.1):
        w = nn.Parameter(torch.tensor([3.0, -2.0], dtype=torch.float64))
        optimizer = unchecked(torch.optim.SGD([w], lr=0.01), strength=strength, g1_clip=None, g2_clip=None)
        for _ in range(400):
            loss = optimizer.step(closure_of(optimizer, lambda w=w: 0.5 * (w.prod() - 1) ** 2))
        assert loss < 1e-12
        curvature[strength] = w.square().sum().item()  # the trace of the Hessian at a minimum
    assert curvature[0.1] < curvature[0.0] - 1.0


def test_it_descends_the_penalised_objective():
    """Small steps end where the gradient of L + (γ/2)‖∇L‖², by double backward, vanishes."""
    model, loss = regression()
    strength = 0.05
    optimizer = unchecked(torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9), strength=strength, eps=1e-4)

    def objective_gradient():
        parameters = list(model.parameters())
        value = loss()
        gradients = torch.autograd.grad(value, parameters, create_graph=True)
        objective = value + 0.5 * strength * sum(gradient.square().sum() for gradient in gradients)
        return norm(torch.autograd.grad(objective, parameters))

    before = objective_gradient()
    for _ in range(400):
        optimizer.step(closure_of(optimizer, loss))
    assert objective_gradient() < 0.02 * before
