"""The regularized step: passes, exclusion, clipping, warm-up, figures."""

import copy
import math
import random
from contextlib import nullcontext

import numpy
import pytest
import torch
from problems import assert_same, closure_of, leave_unread, regression, twin_of, unchecked, weights
from reference import Reference, norm
from torch import nn

from gradreg_optim.core.witnesses import Losses


def sgd(module, **settings):
    return unchecked(torch.optim.SGD(module.parameters(), lr=0.1), **settings)


def test_the_closure_runs_twice_with_gradients_and_the_base_optimizer_without_one():
    """Two calls under enable_grad, also where gradients are off; the base optimizer steps once, on no closure."""
    model, loss = regression()
    seen = []

    class Base(torch.optim.SGD):
        def step(self, closure=None):
            seen.append(closure)
            return super().step(closure)

    optimizer = unchecked(Base(model.parameters(), lr=0.1))
    closure = closure_of(optimizer, loss)
    with torch.no_grad():
        assert not torch.is_grad_enabled()
        optimizer.step(closure)
    assert closure.calls == 2
    assert seen == [None]


def test_the_loss_of_the_first_pass_is_returned():
    """Whatever the closure returns first comes back: the loss at θ."""
    model, _ = regression()
    optimizer = sgd(model)
    losses = iter(["first", "second"])
    gradient = [torch.randn_like(parameter) for parameter in model.parameters()]

    def closure():
        for parameter, value in zip(model.parameters(), gradient, strict=True):
            parameter.grad = value.clone()
        return next(losses)

    assert optimizer.step(closure) == "first"


def test_the_second_pass_stands_at_the_second_point():
    """In the second call the weights are θ + ε·g1, and θ again when the base optimizer steps."""
    model, loss = regression()
    start = weights(model)
    standing = []
    optimizer = unchecked(torch.optim.SGD(model.parameters(), lr=0.0), eps=0.25)
    closure = closure_of(optimizer, lambda: (standing.append(weights(model)), loss())[1])
    optimizer.step(closure)
    assert_same(standing[0], start)
    expected = [torch.add(value, g, alpha=0.25) for value, g in zip(start, closure.gradients[0], strict=True)]
    assert_same(standing[1], expected)
    assert_same(weights(model), start)  # a learning rate of 0: not a bit has moved


def test_gradient_accumulation_in_the_closure():
    """Micro-batches summed inside the closure give the step of the whole batch, as the twin takes it."""
    model = nn.Linear(3, 1, dtype=torch.float64)
    other = copy.deepcopy(model)
    batches = torch.randn(4, 5, 3, dtype=torch.float64)
    optimizer = sgd(model, strength=0.1, eps=0.01)
    twin = Reference(torch.optim.SGD(other.parameters(), lr=0.1), strength=0.1, eps=0.01)

    def closure():
        optimizer.zero_grad()
        total = 0.0
        for batch in batches:
            loss = model(batch).cosh().log().mean() / len(batches)
            loss.backward()
            total += loss.item()
        return total

    whole = closure_of(twin.optimizer, lambda: other(batches.flatten(0, 1)).cosh().log().mean())
    assert optimizer.step(closure) == pytest.approx(twin.step(whole).item(), rel=1e-14)  # order of summation
    # Order of summation, times γ/ε.
    torch.testing.assert_close(weights(model), weights(other), rtol=1e-12, atol=1e-13)


def test_both_passes_see_the_same_random_numbers():
    """Dropout, NumPy and Python draw the same in both passes, and afterwards go on as after one pass."""
    model, loss = regression(nn.Dropout(0.5))
    optimizer = sgd(model)
    drawn = []

    def draw():
        return torch.rand(()).item(), numpy.random.rand(), random.random()

    def noisy_loss():
        value = loss()
        drawn.append((value.item(), *draw()))
        return value

    state = torch.get_rng_state(), numpy.random.get_state(), random.getstate()
    optimizer.step(closure_of(optimizer, noisy_loss))
    after = draw()
    assert drawn[0][1:] == drawn[1][1:]
    torch.set_rng_state(state[0])
    numpy.random.set_state(state[1])
    random.setstate(state[2])
    noisy_loss()
    assert draw() == after


def test_dropout_noise_is_no_penalty():
    """On a loss that is linear in the weights g2 = g1, dropout or not: drawn anew, masks would make a penalty."""
    layer = nn.Linear(8, 1)
    inputs = torch.randn(16, 8)
    optimizer = sgd(layer)
    optimizer.step(closure_of(optimizer, lambda: layer(nn.functional.dropout(inputs, 0.5)).mean()))
    assert optimizer.metrics["penalty_ratio"] == 0.0


@pytest.mark.parametrize("known", [True, False], ids=["model given", "model found"])
def test_batch_norm_statistics_move_once(known):
    """After three steps the running statistics are those of three passes, not six."""
    model, loss = regression(nn.BatchNorm1d(6))
    optimizer = unchecked(torch.optim.SGD(model.parameters(), lr=0.1), model=model if known else None)
    for step in range(3):
        other = copy.deepcopy(model)
        loss(other)
        closure = closure_of(optimizer, loss)
        optimizer.step(closure)
        assert closure.calls == 2
        assert_same(list(model.buffers()), list(other.buffers()))
        assert model[2].num_batches_tracked == step + 1


def test_exclusion():
    """Excluded parameters stay at θ in the second pass and are updated with g1; the others feel nothing of them."""
    model, loss = regression()
    start = weights(model)
    standing = []
    optimizer = sgd(model, strength=0.1, eps=0.1, exclude=("0.", "bias"), model=model)
    closure = closure_of(optimizer, lambda: (standing.append(weights(model)), loss())[1])
    optimizer.step(closure)
    names = [name for name, _ in model.named_parameters()]
    assert names == ["0.weight", "0.bias", "2.weight", "2.bias"]
    for index, parameter in enumerate(model.parameters()):
        g1, g2 = closure.gradients[0][index], closure.gradients[1][index]
        if names[index] == "2.weight":
            assert_same(standing[1][index], torch.add(start[index], g1, alpha=0.1))
            assert_same(parameter.grad, g2)  # γ = ε
        else:
            assert_same(standing[1][index], start[index])
            assert_same(parameter.grad, g1)
            assert (g1 != g2).any()
    only = closure.gradients[0][2]
    # A root, squared and taken again.
    assert optimizer.metrics["g1_norm"] == pytest.approx(only.norm().item(), rel=1e-14)


def test_clips_as_published():
    """g1 is clipped first and is then the g1 of the formula; g2 is clipped before the difference is taken."""
    model, loss = regression()
    other, other_loss = twin_of(model, loss)
    start = weights(model)
    gradients = torch.autograd.grad(other_loss(), list(other.parameters()))
    d = [0.05 / (norm(gradients) + 1e-6) * gradient for gradient in gradients]
    with torch.no_grad():
        for parameter, value, along in zip(other.parameters(), start, d, strict=True):
            parameter.copy_(value + 0.5 * along)
    g2 = torch.autograd.grad(other_loss(), list(other.parameters()))
    clipped = [0.03 / (norm(g2) + 1e-6) * gradient for gradient in g2]
    expected = [a + 0.25 / 0.5 * (b - a) for a, b in zip(d, clipped, strict=True)]
    optimizer = sgd(model, strength=0.25, eps=0.5, g1_clip=0.05, g2_clip=0.03)
    optimizer.step(closure_of(optimizer, loss))
    actual = [parameter.grad for parameter in model.parameters()]
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)  # order of a few operations
    metrics = {name: float(value) for name, value in optimizer.metrics.items()}
    assert (metrics["g1_clipped"], metrics["g2_clipped"]) == (1.0, 1.0)
    assert metrics["g1_norm"] == pytest.approx(norm(gradients), rel=1e-12)  # both are norms before clipping
    assert metrics["g2_norm"] == pytest.approx(norm(g2), rel=1e-12)


@pytest.mark.parametrize("known", [True, False], ids=["float32", "unread"])
def test_two_clips_that_leave_no_difference(known, monkeypatch):
    """g1 and g2 clipped to the same vector: the penalty is rounding, and must not become the root of a negative number."""
    if not known:
        leave_unread(monkeypatch)
    for value in torch.linspace(0.1, 3.0, 50).tolist():
        w = nn.Parameter(torch.full((7,), value))
        optimizer = unchecked(torch.optim.SGD([w], lr=0.1), g1_clip=0.5, g2_clip=0.5, max_penalty_ratio=0.5)
        optimizer.step(closure_of(optimizer, lambda w=w: (3 * w**2).sum()))
        assert math.isfinite(float(optimizer.metrics["penalty_ratio"]))
        # The clipped gradient has norm ½ and points along w; 1e-3: rounding, times γ/ε, and the bound.
        torch.testing.assert_close(w.detach(), torch.full((7,), value - 0.05 / math.sqrt(7)), rtol=0, atol=1e-3)


def test_a_second_gradient_of_zero_is_finite(monkeypatch):
    """g2 = 0, where ‖g2‖² comes out of a cancelling sum, is a number like any other, and nothing is skipped."""
    monkeypatch.setattr(Losses, "are_far", lambda *_: False)  # the second loss is another one on purpose
    for value in torch.linspace(0.1, 3.0, 50).tolist():
        w = nn.Parameter(torch.full((7,), value))
        optimizer = unchecked(torch.optim.SGD([w], lr=0.1), strength=0.5, eps=1.0, g1_clip=None)
        calls = iter([1.0, 0.0])
        optimizer.step(closure_of(optimizer, lambda w=w, calls=calls: next(calls) * (w**3).sum()))
        assert optimizer.metrics["skipped"] == 0
        assert_same(w.grad, 3 * torch.full((7,), value) ** 2 / 2)


@pytest.mark.parametrize("bound", [1e-3, 0.05])
def test_max_penalty_ratio_bounds_the_penalty_without_turning_it(bound):
    """The combined gradient is g1 + s·penalty with ‖s·penalty‖ = bound·‖g1‖."""
    model, loss = regression()
    optimizer = sgd(model, strength=1.0, eps=0.01, max_penalty_ratio=bound)
    closure = closure_of(optimizer, loss)
    optimizer.step(closure)
    g1, g2 = closure.gradients
    penalty = [100.0 * (b - a) for a, b in zip(g1, g2, strict=True)]
    assert norm(penalty) > bound * norm(g1)
    shorter = bound * norm(g1) / norm(penalty)
    expected = [a + shorter * x for a, x in zip(g1, penalty, strict=True)]
    actual = [parameter.grad for parameter in model.parameters()]
    # g2 − g1 rounds before it is multiplied.
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-13)
    assert float(optimizer.metrics["penalty_ratio"]) == pytest.approx(bound, rel=1e-10)  # the same


def test_a_bound_that_is_not_reached_changes_nothing():
    """Below its bound the penalty is left alone, bit for bit."""
    model, loss = regression()
    other, other_loss = twin_of(model, loss)
    bounded, free = sgd(model, max_penalty_ratio=1e3), sgd(other)
    bounded.step(closure_of(bounded, loss))
    free.step(closure_of(free, other_loss))
    assert_same(weights(model), weights(other))


def test_warmup_and_schedule_multiply_the_strength():
    """During the warm-up one backward; then each group's strength times the factor, shown in the metrics."""
    model, loss = regression()
    optimizer = sgd(model, strength=0.5, warmup_steps=2, schedule="linear", schedule_steps=4)
    seen = []
    for _ in range(7):
        closure = closure_of(optimizer, loss)
        optimizer.step(closure)
        seen.append((closure.calls, optimizer.metrics["strength"]))
    assert seen == [(1, 0.0), (1, 0.0), (2, 0.125), (2, 0.25), (2, 0.375), (2, 0.5), (2, 0.5)]
    assert optimizer.step_count == 7


def test_metrics_of_a_step_without_penalty():
    """A step that takes no second gradient claims nothing about one, also after steps that did."""
    model, loss = regression()
    optimizer = sgd(model, schedule=lambda step: 1.0 if step == 0 else 0.0)
    assert optimizer.metrics == {"skipped": 0}
    optimizer.step(closure_of(optimizer, loss))
    assert "g1_norm" in optimizer.metrics
    optimizer.step(closure_of(optimizer, loss))
    assert optimizer.metrics == {"strength": 0.0, "skipped": 0}


def test_fidelity_tells_a_step_that_does_not_arrive():
    """bfloat16 weights of 1 do not feel a step of 1e-4: fidelity 0; float32 weights take it whole: fidelity 1."""
    fidelity = {}
    for dtype in (torch.bfloat16, torch.float32):
        w = nn.Parameter(torch.ones(8, dtype=dtype))
        optimizer = unchecked(torch.optim.SGD([w], lr=0.1), eps=1e-4, check_every=1)
        with pytest.warns(UserWarning, match="equal to the last bit") if dtype == torch.bfloat16 else nullcontext():
            optimizer.step(closure_of(optimizer, lambda w=w: 0.5 * w.square().sum()))
        fidelity[dtype] = float(optimizer.metrics["perturbation_fidelity"])
    assert fidelity[torch.bfloat16] == 0.0
    assert fidelity[torch.float32] == pytest.approx(1.0, abs=1e-3)  # 1e-4 is 839 ulps of 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_of_half_precision_are_right(dtype):
    """‖g1‖ of 10 000 half precision elements of 8 is 800: squares that neither overflow nor stop adding up."""
    w = nn.Parameter(torch.ones(10_000, dtype=dtype))
    optimizer = unchecked(torch.optim.SGD([w], lr=0.1), g1_clip=None)
    optimizer.step(closure_of(optimizer, lambda: (8 * w).sum()))
    assert float(optimizer.metrics["g1_norm"]) == pytest.approx(800.0, rel=1e-6)  # a sum in float32
