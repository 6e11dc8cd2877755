"""``fraction=f``: the difference on some micro-batches, its expectation, its randomness, its cost."""

from collections import Counter

import pytest
import torch
from problems import assert_same, closure_of, regression, twin_of, weights
from torch import nn

from gradreg_optim import GradRegOptimizer, MicroBatches
from gradreg_optim.drivers.micro_batches import chosen_part

SETTINGS = {"strength": 0.3, "eps": 1e-3, "g1_clip": None, "g2_clip": None}
COUNT = 6


def problem(count=COUNT, dropout=0.0):
    """A network, and the losses of its micro-batches, which add up to the loss of a step."""
    model, _ = regression(nn.Dropout(dropout))
    inputs, targets = torch.randn(count, 5, 4).double(), torch.randn(count, 5, 2).double()

    def loss(position, model=model):
        return (model(inputs[position]) - targets[position]).square().mean() / count

    return model, loss


class Backward:
    """Forward and backward of a micro-batch; keeps the positions it was called for."""

    def __init__(self, loss):
        self.loss, self.called = loss, []

    def __call__(self, position):
        self.called.append(position)
        value = self.loss(position)
        value.backward()
        return value


def stepped(model, loss, steps=1, count=COUNT, **settings):
    optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), **{**SETTINGS, **settings})
    backward = Backward(loss)
    losses = [optimizer.step(MicroBatches(backward, range(count))) for _ in range(steps)]
    return optimizer, backward.called, losses


def gradient(model, loss, positions):
    total = sum(loss(position) for position in positions)
    return nn.utils.parameters_to_vector(torch.autograd.grad(total, list(model.parameters()))).detach()


def formula(model, loss, part, *, strength, eps, count=COUNT, **_):
    """g1 + (γ/ε)·(n/m)·(g2_S − g1_S)."""
    parameters = list(model.parameters())
    theta = nn.utils.parameters_to_vector(parameters).detach()
    g1, start = gradient(model, loss, range(count)), gradient(model, loss, part)
    nn.utils.vector_to_parameters(theta + eps * g1, parameters)
    end = gradient(model, loss, part)
    nn.utils.vector_to_parameters(theta, parameters)
    return g1 + strength / eps * count / len(part) * (end - start)


@pytest.mark.parametrize("fraction", [1 / 6, 0.5, 5 / 6, 1.0])
@pytest.mark.parametrize("step", range(4))
def test_the_step_is_the_formula(fraction, step):
    """Wherever the part lies: at the beginning, at the end, across both, in the middle."""
    model, loss = problem()
    part = chosen_part(COUNT, fraction, step)
    expected = formula(model, loss, part, **SETTINGS)
    optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), **SETTINGS, fraction=fraction)
    for group in optimizer.param_groups:
        group["gradreg_step"] = step
    backward = Backward(loss)
    value = optimizer.step(MicroBatches(backward, range(COUNT)))
    found = nn.utils.parameters_to_vector([p.grad for p in model.parameters()])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert backward.called == [*range(COUNT), *sorted(part)]
    assert float(value) == pytest.approx(sum(loss(position).item() for position in range(COUNT)))


def test_parts_lie_everywhere_alike():
    """Each micro-batch is in the part with the same probability; the steps of the test above draw several parts."""
    counted = Counter(position for step in range(6000) for position in chosen_part(COUNT, 0.5, step))
    assert all(abs(counted[position] / 6000 - 0.5) < 0.03 for position in range(COUNT))  # 4.6 standard deviations
    assert len({chosen_part(COUNT, 0.5, step) for step in range(4)}) > 2
    assert len(chosen_part(COUNT, 0.01, 0)) == 1


def test_unbiased_over_the_choice():
    """The mean over all parts is the whole difference, to the last digits."""
    model, loss = problem()
    parts = {chosen_part(COUNT, 0.5, step) for step in range(100)}
    assert len(parts) == COUNT
    mean = sum(formula(model, loss, part, **SETTINGS) for part in parts) / len(parts)
    torch.testing.assert_close(mean, formula(model, loss, range(COUNT), **SETTINGS), rtol=1e-9, atol=1e-12)


def test_the_whole_part_is_the_usual_step():
    """``fraction=1``, and micro-batches as the closure: bit for bit the step of the usual closure."""
    model, loss = problem()
    twin, _ = twin_of(model, lambda m: None)
    stepped(model, loss, 3)
    optimizer = GradRegOptimizer(torch.optim.SGD(twin.parameters(), lr=0.05), **SETTINGS)

    def closure():
        optimizer.zero_grad()
        for position in range(COUNT):
            loss(position, twin).backward()

    for _ in range(3):
        optimizer.step(closure)
    assert_same(weights(model), weights(twin))


def test_dropout_is_the_first_pass_s():
    """With a penalty too small to see and γ = ε at θ itself, a step with dropout is the plain one, bit for bit."""
    results = []
    for settings in ({"strength": 0.0}, {"strength": 1e-30, "eps": 1e-30, "fraction": 0.5}):
        torch.manual_seed(0)
        model, loss = problem(dropout=0.5)
        optimizer, *_ = stepped(model, loss, 3, **settings)
        results.append((weights(model), torch.get_rng_state()))
    # g1 + 2·(g2_S − g1_S) with g2_S = g1_S: equal up to the order of sums, while another mask would change the first digit
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-12, atol=1e-14)
    assert torch.equal(results[0][1], results[1][1])
    assert float(optimizer.metrics["cosine"]) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize(
    "settings", [{"method": "central"}, {"method": "exact"}, {"check_every": 1}, {"radius": 0.01}], ids=str
)
def test_every_method_of_a_quadratic_is_exact(settings):
    """Equal micro-batches: each part tells the whole difference."""
    results = []
    for fraction in (1.0, 0.5):
        torch.manual_seed(0)
        model, whole = regression()
        given = {key: value for key, value in SETTINGS.items() if key != "eps" or "radius" not in settings}
        optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), **given, **settings, fraction=fraction)
        for _ in range(3):
            optimizer.step(MicroBatches(Backward(lambda _, loss=whole: loss() / 4), range(4)))
        results.append((weights(model), {name: float(value) for name, value in optimizer.metrics.items()}))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-9, atol=1e-12)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-5, abs=1e-9)


def test_clips_are_those_of_whole_gradients():
    """The clipped step: c2·ĝ2 − c1·g1, with norms of the whole gradient and of its estimate."""
    model, loss = problem()
    part = chosen_part(COUNT, 0.5, 0)
    clipped = {**SETTINGS, "g1_clip": 0.05, "g2_clip": 0.04}
    g1 = gradient(model, loss, range(COUNT))
    d = g1 * (0.05 / (g1.norm() + 1e-6))
    start = gradient(model, loss, part)
    parameters = list(model.parameters())
    theta = nn.utils.parameters_to_vector(parameters).detach()
    nn.utils.vector_to_parameters(theta + SETTINGS["eps"] * d, parameters)
    g2 = g1 + COUNT / len(part) * (gradient(model, loss, part) - start)
    nn.utils.vector_to_parameters(theta, parameters)
    expected = d + SETTINGS["strength"] / SETTINGS["eps"] * (g2 * (0.04 / (g2.norm() + 1e-6)) - d)
    optimizer, *_ = stepped(model, loss, **clipped, fraction=0.5)
    found = nn.utils.parameters_to_vector([p.grad for p in parameters])
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-11)
    assert optimizer.metrics["g1_clipped"]
    assert optimizer.metrics["g2_clipped"]


def test_excluded_parameters_and_late_ones():
    """Excluded ones get the whole g1, at every place of the part."""
    for step in range(3):
        model, loss = problem()
        names = dict(model.named_parameters())
        plain = torch.autograd.grad(sum(loss(position) for position in range(COUNT)), names["0.weight"])[0]
        optimizer = GradRegOptimizer(
            torch.optim.SGD(model.named_parameters(), lr=0.0), **SETTINGS, fraction=0.5, exclude="0.weight"
        )
        optimizer.param_groups[0]["gradreg_step"] = step
        optimizer.step(MicroBatches(Backward(loss), range(COUNT)))
        torch.testing.assert_close(names["0.weight"].grad, plain, rtol=1e-12, atol=1e-15)


def test_a_second_pass_that_fails_leaves_the_whole_first_gradient():
    """And the weights at θ."""
    model, loss = problem()
    before, g1 = weights(model), gradient(model, loss, range(COUNT))
    backward = Backward(loss)

    def failing(position):
        if len(backward.called) == COUNT + 1:
            raise KeyError("lost")
        return backward(position)

    optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), **SETTINGS, fraction=0.5)
    with pytest.raises(KeyError, match="lost"):
        optimizer.step(MicroBatches(failing, range(COUNT)))
    assert_same(weights(model), before)
    found = nn.utils.parameters_to_vector([p.grad for p in model.parameters()])
    torch.testing.assert_close(found, g1, rtol=1e-12, atol=1e-15)


def test_without_a_penalty_it_is_the_wrapped_optimizer():
    """In warm-up and between regularized steps each micro-batch runs once."""
    model, loss = problem()
    _, called, _ = stepped(model, loss, 4, fraction=0.5, warmup_steps=1, every=2)
    assert [called.count(position) for position in range(COUNT)] == [
        4 + sum(position in chosen_part(COUNT, 0.5, step) for step in (1, 3)) for position in range(COUNT)
    ]


def test_a_closure_that_runs_everything_is_refused():
    """It cannot be run in part."""
    model, loss = regression()
    optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), fraction=0.5)
    with pytest.raises(RuntimeError, match=r"fraction=0.5.*MicroBatches"):
        optimizer.step(closure_of(optimizer, loss))
    with pytest.raises(ValueError, match="batches"):
        MicroBatches(loss, [])


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_a_stop_iteration_in_a_further_pass_goes_on(fraction):
    """It is the micro-batch's own, and does not end the step: nothing trains without the penalty unnoticed."""
    model, loss = problem()
    optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), **SETTINGS, fraction=fraction)
    backward, start = Backward(loss), weights(model)

    def exhausted(position):
        if len(backward.called) == COUNT:
            raise StopIteration
        return backward(position)

    with pytest.raises(StopIteration):
        optimizer.step(MicroBatches(exhausted, range(COUNT)))
    assert_same(weights(model), start)
    assert optimizer.step_count == 0
