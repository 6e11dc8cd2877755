"""Low precision: what rounding lets through, and what the checks say about the difference."""

import copy
import math
import warnings

import pytest
import torch
from problems import assert_same, closure_of, regression, weights
from torch import nn

from gradreg_optim import GradRegOptimizer
from gradreg_optim.core.multi_tensor import StochasticRounding, inner, save_and_shift_
from gradreg_optim.core.precision import advice, signal_fraction


def test_stochastic_rounding_is_right_on_average():
    """Each value becomes one of its two neighbours in bfloat16, and their mean is the value."""
    values = torch.tensor([1.0009765625, -3.3e-5, 0.02001, -1.0, 0.0])
    draws = torch.stack([StochasticRounding(seed).round_(values.clone()).bfloat16() for seed in range(2000)])
    assert draws.dtype == torch.bfloat16
    nearest, spacing = values.bfloat16(), values.abs() * 2**-7
    assert bool(((draws.float() - values).abs() <= spacing).all())
    mean, deviation = draws.double().mean(0), spacing / 2 / math.sqrt(len(draws))
    assert bool(((mean - values).abs() <= 5 * deviation).all())
    assert bool((nearest[0] != draws[:, 0]).any())  # which rounding to nearest never reaches
    # On the grid there is nothing to round.
    assert_same(draws[0, 3:], torch.tensor([-1.0, 0.0], dtype=torch.bfloat16))


def test_stochastic_rounding_keeps_what_is_not_finite():
    """Infinities and NaN stay what they are."""
    values = torch.tensor([math.inf, -math.inf, math.nan])
    assert_same(StochasticRounding(0).round_(values.clone()).bfloat16(), values.bfloat16())


def test_only_bfloat16_is_rounded_stochastically():
    """Other dtypes in the same list take the step as ever."""
    single, half, brain = (torch.full((1000,), 1.0, dtype=dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16))
    along = [torch.full((1000,), 1e-4, dtype=tensor.dtype) for tensor in (single, half, brain)]
    save_and_shift_([single, half, brain], along, eps=1.0, seed=0)
    assert_same(single, torch.full((1000,), 1.0001))
    assert_same(half, torch.ones(1000, dtype=torch.float16))
    assert 0 < int((brain > 1).sum()) < 50  # 1e-4 of a spacing of 2^-7


def bf16_problem():
    """Weights near 1 and gradients near 0.01: steps of ε = 1e-2 are far below half a spacing."""
    weight = nn.Parameter(1 + torch.rand(64, 64).bfloat16() / 2)
    return weight, lambda: 0.005 * weight.float().square().sum()


@pytest.mark.parametrize(("rounding", "fidelity"), [("nearest", 0.0), ("stochastic", 1.0)])
def test_what_arrives_of_a_short_step(rounding, fidelity):
    """On the grid nothing arrives, stochastically all of it, on average over 4096 weights."""
    weight, loss = bf16_problem()
    optimizer = GradRegOptimizer(torch.optim.SGD([weight], lr=0.0), eps=1e-2, rounding=rounding, check_every=0)
    before = weights(optimizer)
    optimizer.step(closure_of(optimizer, loss))
    # 1e-4 of 4096 move.
    assert float(optimizer.metrics["perturbation_fidelity"]) == pytest.approx(fidelity, abs=0.5)
    assert_same(weights(optimizer), before)


def test_stochastic_steps_repeat():
    """The same step draws the same numbers, the next step others; the global generators stay where they are."""
    points = []
    for _ in range(2):
        torch.manual_seed(0)
        weight, loss = bf16_problem()
        optimizer = GradRegOptimizer(torch.optim.SGD([weight], lr=0.0), radius=0.1, check_every=0)

        def noted(weight=weight, loss=loss):
            points.append(weight.detach().clone())
            return loss()

        state = torch.get_rng_state()
        for _ in range(2):
            optimizer.step(closure_of(optimizer, noted))
        assert_same(torch.get_rng_state(), state)
    assert_same(points[:4], points[4:])
    assert not torch.equal(points[1], points[3])


class Noisy:
    """A loss whose gradient carries an error of given relative size, another one at each call, as rounding's is."""

    def __init__(self, size):
        self.model, self.loss = regression()
        self.parameters = list(self.model.parameters())
        self.size, self.calls = size, 0
        self.noise = torch.Generator().manual_seed(1)

    def optimizer(self, **settings):
        self.optimizer = GradRegOptimizer(torch.optim.SGD(self.parameters, lr=0.0), **settings)
        return self.optimizer

    def __call__(self):
        self.calls += 1
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in self.parameters])
        error = torch.randn(gradient.shape, generator=self.noise, dtype=gradient.dtype)
        error *= self.size * gradient.norm() / error.norm()
        for parameter, part in zip(self.parameters, error.split([p.numel() for p in self.parameters]), strict=True):
            parameter.grad += part.view_as(parameter)
        return loss


def test_the_floor_is_the_noise_of_two_gradients():
    """Errors of 1% each differ by √2%, whatever the step; a difference that is no larger has no signal."""
    noisy = Noisy(0.01)
    optimizer = noisy.optimizer(eps=1e-6, check_every=1)
    with pytest.warns(UserWarning, match=r"the self-check is .* Rounding prevails: a longer step helps"):
        optimizer.step(noisy)
    assert optimizer.metrics["noise_floor"] == pytest.approx(0.01 * math.sqrt(2), rel=0.2)
    assert float(optimizer.metrics["signal"]) < 0.4
    assert optimizer.metrics["self_check"] == pytest.approx(-0.5, abs=0.3)


@pytest.mark.parametrize("method", ["forward", "central"])
def test_signal_and_self_check_without_noise(method):
    """Where there is nothing but curvature, both are 1, and nobody is warned."""
    noisy = Noisy(0.0)
    optimizer = noisy.optimizer(eps=1e-3, check_every=1, method=method)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(noisy)
    assert optimizer.metrics["self_check"] == pytest.approx(1.0, abs=1e-4)
    assert float(optimizer.metrics["signal"]) == pytest.approx(1.0, abs=1e-3)
    assert noisy.calls == 4


@pytest.mark.parametrize("method", ["forward", "central"])
def test_a_check_under_a_scaler(method):
    """The figures are those of the unscaled loss."""
    figures = []
    for scale in (None, 1024.0):
        torch.manual_seed(0)
        model, loss = regression()
        scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
        base = torch.optim.SGD(model.parameters(), lr=0.0)
        optimizer = GradRegOptimizer(base, eps=0.5, check_every=1, method=method, scaler=scaler)
        optimizer.step(closure_of(optimizer, loss, *([] if scaler is None else [scaler.scale])))
        figures.append({name: float(optimizer.metrics[name]) for name in ("self_check", "noise_floor", "signal")})
    assert figures[1] == pytest.approx(figures[0], rel=1e-9)
    assert figures[0]["self_check"] < 1 - 1e-6


def test_a_step_that_is_too_long():
    """Curvature that changes within the step is told from rounding."""
    weight = nn.Parameter(torch.rand(100, dtype=torch.float64))
    optimizer = GradRegOptimizer(torch.optim.SGD([weight], lr=0.0), radius=20.0, check_every=1)
    with pytest.warns(UserWarning, match="curvature changes within the step: a shorter one helps"):
        optimizer.step(closure_of(optimizer, lambda: torch.sin(5 * weight).sum()))


def test_warns_once():
    """One warning, with figure and remedy; the figures go on in the metrics."""
    noisy = Noisy(0.01)
    optimizer = noisy.optimizer(eps=1e-6, check_every=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.step(noisy)
    assert len([warning for warning in caught if "self-check" in str(warning.message)]) == 1


def test_shrink_takes_the_noise_out():
    """The penalty is multiplied by its share of signal, max(0, 1 − floor²/rel²), and by nothing else."""
    gradients = []
    for shrink in (False, True):
        torch.manual_seed(0)
        noisy = Noisy(0.01)
        optimizer = noisy.optimizer(strength=1.0, eps=0.05, check_every=1, shrink=shrink, g2_clip=None)
        optimizer.param_groups[0]["gradreg_is_low"] = True  # elsewhere there is nothing to shrink for
        optimizer.step(noisy)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in noisy.parameters]))
        signal, penalty_ratio = (float(optimizer.metrics[name]) for name in ("signal", "penalty_ratio"))
    torch.manual_seed(0)
    once = Noisy(0.01)
    once.optimizer()
    once()
    g1 = torch.cat([parameter.grad.flatten() for parameter in once.parameters])
    assert 0.2 < signal < 0.99
    torch.testing.assert_close(gradients[1] - g1, signal * (gradients[0] - g1))
    assert penalty_ratio == pytest.approx(float((gradients[1] - g1).norm() / g1.norm()))


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("method", ["forward", "central"])
def test_a_check_changes_nothing(method, clip):
    """Without ``shrink``, with and without checks, and whether clips engage or not, the same bits come out."""
    found = []
    for every in (0, 1):
        torch.manual_seed(0)
        model, loss = regression()
        optimizer = GradRegOptimizer(
            torch.optim.Adam(model.parameters(), lr=0.01),
            check_every=every,
            g1_clip=clip,
            method=method,
            shrink=False,
        )
        closure = closure_of(optimizer, loss)
        for _ in range(3):
            optimizer.step(closure)
        found.append(weights(model))
    assert_same(*found)
    # Also of gradients that were clipped.
    assert optimizer.metrics["self_check"] == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("method", ["forward", "central"])
def test_a_check_with_a_parameter_that_only_one_point_reaches(method):
    """No gradient is a gradient of 0: the cosine is that of (2, 2, 1, 1) and (2, 2, 0, 0)."""
    used, rare = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))

    def loss():  # beyond θ, where the gradient leads
        return used.square().sum() + (rare.sum() if used.detach().sum() > 2 else 0.0)

    optimizer = GradRegOptimizer(torch.optim.SGD([used, rare], lr=0.0), eps=0.5, check_every=1, method=method)
    optimizer.step(closure_of(optimizer, loss))
    assert optimizer.metrics["self_check"] == pytest.approx(8 / math.sqrt(80), rel=1e-6)


def test_when_checks_are_made():
    """At the first regularized step and every ``check_every`` steps; never by default in float32, every 100 in bfloat16."""

    def calls(steps, dtype=torch.float32, **settings):
        model, loss = regression(dtype=dtype)
        optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), eps=1.0, **settings)
        closure, counted = closure_of(optimizer, loss), []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(steps):
                before = closure.calls
                optimizer.step(closure)
                counted.append(closure.calls - before)
        return counted

    assert calls(5, check_every=3) == [4, 2, 2, 4, 2]
    assert calls(5, check_every=3, warmup_steps=2) == [1, 1, 4, 4, 2]
    assert calls(2) == [4, 2]
    assert calls(2, check_every=0, dtype=torch.bfloat16) == [2, 2]
    assert calls(101, dtype=torch.bfloat16) == [4] + [2] * 99 + [4]


def test_the_floor_is_saved():
    """A run that is resumed knows the floor, does not measure it again, and goes on to the bit."""

    def steps(optimizer, closure, count):
        for _ in range(count):
            optimizer.step(closure)

    settings = {"strength": 0.1, "check_every": 4, "shrink": True}
    model, loss = regression()
    optimizer = GradRegOptimizer(torch.optim.Adam(model.parameters(), lr=0.01), **settings)
    steps(optimizer, closure_of(optimizer, loss), 2)
    saved, at_save = copy.deepcopy(optimizer.state_dict()), weights(model)
    steps(optimizer, closure_of(optimizer, loss), 4)
    expected = weights(model)

    for parameter, value in zip(model.parameters(), at_save, strict=True):
        parameter.data.copy_(value)
    resumed = GradRegOptimizer(torch.optim.Adam(model.parameters(), lr=0.01), **settings)
    resumed.load_state_dict(saved)
    closure = closure_of(resumed, loss)
    steps(resumed, closure, 1)
    assert closure.calls == 2
    steps(resumed, closure, 3)
    assert_same(weights(model), expected)


def test_figures_and_remedies():
    """The advice follows from the figures."""
    assert "Rounding prevails: a longer step helps (set radius=0.04), and more do fp16" in advice(0.3, 0.1, 0.1, 1e-3, 0.02)
    # Ten times, and not sixty.
    assert "longer step helps (set radius=0.2)" in advice(0.3, 1e-4, 1e-4, 1e-3, 0.02)
    assert "a shorter one helps (set radius=0.004)" in advice(0.3, 0.001, 0.1, 1e-3, 0.02)
    assert "a shorter one helps (set radius=0.01)" in advice(0.3, 0.1, 0.21, 1e-3, 0.02)
    assert "a shorter one helps" in advice(0.3, 0.9, 1.0, 1e-3, 0.02)  # so much is not rounding


def test_signal_fraction_of_nothing():
    """No difference at all is no signal."""
    assert float(signal_fraction(torch.tensor(0.0), 0.1)) == 0.0
    assert float(signal_fraction(torch.tensor(0.0), 0.0)) == 0.0
    assert float(signal_fraction(torch.tensor(1.0), 0.0)) == 1.0


def test_inner_products_of_small_differences():
    """Two differences of a few last places, which inner products of the tensors themselves would lose."""
    base = torch.rand(100_000) + 1
    a, c = base + 2**-20, base + 2**-21
    expected = ((a.double() - base.double()) * (c.double() - base.double())).sum()
    torch.testing.assert_close(inner([a], [c], [base]).double(), expected, rtol=1e-4, atol=0)
    assert float(inner([], [], [])) == 0.0
