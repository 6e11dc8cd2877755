"""``memory="lean"``: the same step with one gradient in memory."""

import pytest
import torch
from problems import Quadratic, closure_of, regression, twin_of, weights
from torch import nn

from gradreg_optim import GradRegOptimizer
from gradreg_optim.finite_difference import sampled

SETTINGS = {"strength": 0.3, "eps": 1e-3, "g2_clip": None}


def steps(model, loss, count=3, base=torch.optim.SGD, **settings):
    optimizer = GradRegOptimizer(base(model.parameters(), lr=0.05), **{**SETTINGS, **settings})
    for _ in range(count):
        optimizer.step(closure_of(optimizer, loss))
    return optimizer


@pytest.mark.parametrize("settings", [{}, {"strength": 1e-3}, {"radius": 0.01, "eps": 1e-3}, {"g1_clip": 0.05}], ids=str)
def test_lean_is_the_same_step(settings):
    """To rounding in float64, weights and figures: those are taken from all elements of small tensors."""
    if "radius" in settings:
        settings = {"radius": 0.01}
    defaults = {name: value for name, value in SETTINGS.items() if name != "eps" or "radius" not in settings}
    model, loss = regression()
    twin, twin_loss = twin_of(model, loss)
    lean = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), **{**defaults, **settings}, memory="lean")
    full = GradRegOptimizer(torch.optim.SGD(twin.parameters(), lr=0.05), **{**defaults, **settings})
    for _ in range(3):
        lean.step(closure_of(lean, loss))
        full.step(closure_of(full, twin_loss))
    torch.testing.assert_close(weights(model), weights(twin), rtol=1e-11, atol=1e-13)
    assert lean.metrics.keys() == full.metrics.keys()
    for name, value in full.metrics.items():
        assert float(lean.metrics[name]) == pytest.approx(float(value), rel=1e-6), name


def test_lean_is_exact_on_a_quadratic():
    """(I + γA)·AW, with micro-batches that arrive one after the other."""
    problem = Quadratic()
    start = problem.weight.detach().clone()
    optimizer = GradRegOptimizer(
        torch.optim.SGD([problem.weight], lr=0.5), strength=0.25, eps=0.5, g1_clip=None, memory="lean"
    )

    def closure():
        optimizer.zero_grad()
        for _ in range(4):
            (problem() / 4).backward()

    optimizer.step(closure)
    g1 = problem.hessian @ start
    torch.testing.assert_close(problem.weight.detach(), start - 0.5 * (g1 + 0.25 * problem.hessian @ g1))


@pytest.mark.parametrize("to_none", [True, False])
def test_a_closure_may_clear_as_it_likes(to_none):
    """Nothing is left in ``.grad`` for it to zero in place."""
    model, loss = regression()
    twin, twin_loss = twin_of(model, loss)
    lean = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), **SETTINGS, memory="lean")

    def closure():
        model.zero_grad(set_to_none=to_none)
        loss().backward()

    lean.step(closure)
    steps(twin, twin_loss, 1)
    torch.testing.assert_close(weights(model), weights(twin), rtol=1e-11, atol=1e-13)


def test_float32_loses_no_more_than_the_gradients_did():
    """At γ/ε = 10 the float32 step stays within 1e-4 of the penalty's length of the float64 one."""
    model, loss = regression(nn.Linear(6, 6), nn.Tanh())
    inputs, targets = torch.randn(16, 4), torch.randn(16, 2)
    double, single = model, twin_of(model, loss)[0].float()
    gradients = []
    for network, memory in ((double, "full"), (single, "full"), (single, "lean")):
        dtype = next(network.parameters()).dtype
        optimizer = GradRegOptimizer(
            torch.optim.SGD(network.parameters(), lr=0.0), strength=1e-2, eps=1e-3, g2_clip=None, memory=memory
        )
        optimizer.step(closure_of(optimizer, lambda f=network, t=dtype: (f(inputs.to(t)) - targets.to(t)).square().mean()))
        gradients.append(nn.utils.parameters_to_vector([p.grad for p in network.parameters()]).double())
    penalty = float(optimizer.metrics["penalty_ratio"] * optimizer.metrics["g1_norm"])
    errors = [float((gradient - gradients[0]).norm()) for gradient in gradients[1:]]
    assert errors[1] < 2 * errors[0] + 1e-4 * penalty


def test_parameters_that_one_pass_does_not_reach():
    """Their gradient is 0 in that pass, as in a full step."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
            self.calls = 0

        def forward(self):
            self.calls += 1
            used = (self.a, self.b)[self.calls % 2]
            return (used**2).sum() + 0.0 * self.a[0] if self.calls % 2 else (used**2).sum()

    results = []
    for memory in ("full", "lean"):
        model = Gated()
        model.b.data.mul_(2)
        optimizer = steps(model, model, 1, memory=memory)
        results.append(weights(model))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)
    assert optimizer.metrics["penalty_ratio"] > 0


def test_a_second_pass_that_fails():
    """The weights are at θ, the gradients are gone, the next step works."""
    model, loss = regression()
    before = weights(model)
    optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), **SETTINGS, memory="lean")
    closure = closure_of(optimizer, loss)

    def failing():
        value = closure()
        if closure.calls == 2:
            raise KeyError("lost")
        return value

    with pytest.raises(KeyError, match="lost"):
        optimizer.step(failing)
    torch.testing.assert_close(weights(model), before, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())
    optimizer.step(closure)
    assert optimizer.metrics["penalty_ratio"] > 0


def test_a_second_gradient_that_is_not_finite():
    """There is no g1 to fall back on: the step has no gradient, and is counted."""
    model, loss = regression()
    before = weights(model)
    optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), **SETTINGS, memory="lean")
    factors = iter([1.0, float("inf")])
    optimizer.step(closure_of(optimizer, lambda: loss() * next(factors)))
    assert optimizer.metrics["skipped"] == 1
    torch.testing.assert_close(weights(model), before, rtol=0, atol=0)


def test_figures_of_large_tensors_are_estimates():
    """From 4096 elements of each tensor, within a few percent of the full ones here."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 64))
    inputs, targets = torch.randn(256, 64), torch.randn(256, 64)
    assert sampled(model[0].weight).numel() < model[0].weight.numel()
    found = []
    for memory in ("full", "lean"):
        optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), strength=0.1, eps=0.1, memory=memory)
        optimizer.step(closure_of(optimizer, lambda: (model(inputs) - targets).square().mean()))
        found.append({name: float(value) for name, value in optimizer.metrics.items()})
    for name in ("penalty_ratio", "curvature", "g2_norm", "cosine", "perturbation_fidelity", "g1_norm"):
        assert found[1][name] == pytest.approx(found[0][name], rel=0.1), name


def test_half_precision_gradients_are_refused():
    """bf16 sums would lose the difference; nothing is changed."""
    model, loss = regression(dtype=torch.bfloat16)
    before = weights(model)
    optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), memory="lean")
    with pytest.raises(ValueError, match=r"memory='lean'.*torch.bfloat16"):
        optimizer.step(closure_of(optimizer, loss))
    torch.testing.assert_close(weights(model), before, rtol=0, atol=0)
    assert all(p.grad is not None for p in model.parameters())
