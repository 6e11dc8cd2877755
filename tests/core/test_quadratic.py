"""Closed form: on a quadratic a forward difference is exact, at any ε and for any optimizer."""

import copy

import pytest
import torch
from problems import Quadratic, assert_same, closure_of, every_optimizer, unchecked
from torch import nn

STRENGTH, EPS = 2.0**-3, 2.0**-5  # with integer A and W every number of the first gradients is exact


def settings_of(optimizer_class):
    return {"lr": 0.125} if optimizer_class is not torch.optim.Adadelta else {"lr": 1.0}


@pytest.mark.parametrize("optimizer_class", **every_optimizer)
def test_step_is_the_base_step_on_the_exact_gradient(optimizer_class):
    """Three steps equal those of the bare optimizer fed with g1 + γ·A·g1, bit for bit, its state included."""
    loss = Quadratic()
    hessian = loss.hessian
    exact = nn.Parameter(loss.weight.detach().clone())
    base = optimizer_class([exact], **settings_of(optimizer_class))
    inner = optimizer_class([loss.weight], **settings_of(optimizer_class))
    optimizer = unchecked(inner, strength=STRENGTH, eps=EPS, g1_clip=None, g2_clip=None)
    for _ in range(3):
        value = optimizer.step(closure_of(optimizer, loss))
        g1 = hessian @ exact.detach()
        assert value.item() == 0.5 * (exact * g1).sum().item()  # the loss at θ, not at θ'
        exact.grad = g1 + STRENGTH * hessian @ g1
        base.step()
        assert_same(loss.weight.grad, exact.grad)
        assert_same(loss.weight.detach(), exact.detach())
        assert_same(list(inner.state[loss.weight].values()), list(base.state[exact].values()))
        start = torch.randint(-4, 5, exact.shape).double()  # back on the integers, where nothing is rounded
        loss.weight.data.copy_(start)
        exact.data.copy_(start)


@pytest.mark.parametrize("optimizer_class", **every_optimizer)
def test_penalty_changes_the_step(optimizer_class):
    """No optimizer ignores the penalty: the same step without it ends elsewhere."""
    loss = Quadratic()
    # Different rows need different directions: Rprop and a first Adam step see nothing but signs.
    loss.weight.data = 4 * torch.tensor([[1.0, 2.0, -1.0], [-2.0, 1.0, 1.0], [1.0, 1.0, 2.0], [2.0, -1.0, 1.0]]).double()
    other = copy.deepcopy(loss)
    for strength, quadratic in ((8.0, loss), (0.0, other)):
        optimizer = unchecked(
            optimizer_class([quadratic.weight], **settings_of(optimizer_class)), strength=strength, eps=EPS
        )
        for _ in range(3):
            optimizer.step(closure_of(optimizer, quadratic))
    assert (loss.weight != other.weight).any()


@pytest.mark.parametrize("power", [-20, -10, 0, 10])
def test_any_eps_is_exact(power):
    """From 1e-6 to 1000, ε makes no difference on a quadratic."""
    loss = Quadratic()
    expected = loss.hessian @ loss.weight.detach()
    expected = expected + STRENGTH * loss.hessian @ expected
    optimizer = unchecked(
        torch.optim.SGD([loss.weight], lr=0.1), strength=STRENGTH, eps=2.0**power, g1_clip=None, g2_clip=None
    )
    optimizer.step(closure_of(optimizer, loss))
    assert_same(loss.weight.grad, expected)


@pytest.mark.parametrize("radius", [1e-3, 1.0, 30.0])
def test_any_radius_is_exact(radius):
    """The length of the step makes no difference on a quadratic either, and is kept."""
    loss = Quadratic()
    g1 = loss.hessian @ loss.weight.detach()
    optimizer = unchecked(
        torch.optim.SGD([loss.weight], lr=0.1), strength=STRENGTH, radius=radius, g1_clip=None, g2_clip=None
    )
    closure = closure_of(optimizer, loss)
    optimizer.step(closure)
    expected = g1 + STRENGTH * loss.hessian @ g1
    # ε = ρ/‖g1‖ is no power of two: rounding, divided by ε.
    torch.testing.assert_close(loss.weight.grad, expected, rtol=1e-9, atol=1e-9)
    moved = torch.linalg.solve(loss.hessian, closure.gradients[1][0]) - torch.linalg.solve(loss.hessian, g1)
    torch.testing.assert_close(moved.norm().item(), radius, rtol=1e-8, atol=0)  # solving and rounding


def test_figures_on_a_quadratic():
    """Every metric has a closed form here: curvature is the Rayleigh quotient of A along g1."""
    loss = Quadratic()
    g1 = (loss.hessian @ loss.weight.detach()).flatten()
    product = (loss.hessian @ loss.hessian @ loss.weight.detach()).flatten()
    g2 = g1 + EPS * product
    optimizer = unchecked(torch.optim.SGD([loss.weight], lr=0.1), strength=STRENGTH, eps=EPS, g1_clip=None, g2_clip=None)
    optimizer.step(closure_of(optimizer, loss))
    expected = {
        "strength": STRENGTH,
        "eps": EPS,
        "g1_norm": g1.norm(),
        "g2_norm": g2.norm(),
        "penalty_ratio": STRENGTH * product.norm() / g1.norm(),
        "curvature": (g1 @ product) / (g1 @ g1),
        "cosine": (g1 @ g2) / (g1.norm() * g2.norm()),
        "perturbation_fidelity": 1.0,
        "loss_check": 1.0,
        "g1_clipped": 0.0,
        "g2_clipped": 0.0,
        "skipped": 0.0,
    }
    assert set(optimizer.metrics) == set(expected)
    for name, value in expected.items():
        assert float(optimizer.metrics[name]) == pytest.approx(
            float(value), rel=1e-10, abs=0
        )  # order of summation; losses of 1e3 change by 1


@pytest.mark.parametrize("flags", [{"foreach": True}, {"fused": True}, {"capturable": False, "amsgrad": True}])
def test_variants_of_one_optimizer(flags):
    """The implementation that the base optimizer chooses does not matter to the wrapper."""
    loss = Quadratic()
    g1 = loss.hessian @ loss.weight.detach()
    exact = nn.Parameter(loss.weight.detach().clone())
    exact.grad = g1 + STRENGTH * loss.hessian @ g1
    torch.optim.AdamW([exact], **flags).step()
    optimizer = unchecked(torch.optim.AdamW([loss.weight], **flags), strength=STRENGTH, eps=EPS, g1_clip=None, g2_clip=None)
    optimizer.step(closure_of(optimizer, loss))
    assert_same(loss.weight.detach(), exact.detach())
