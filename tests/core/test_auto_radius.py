"""The radius that finds itself where precision is low."""

from __future__ import annotations

import copy
import itertools
import math
import warnings

import pytest
import torch
from problems import closure_of
from torch import nn

from gradreg_optim import GradRegConfig, GradRegOptimizer
from gradreg_optim.core.plan import START
from gradreg_optim.core.precision import MOST, advice, balanced, following, longer, too_short


def problem(dtype=torch.float32, autocast=None, seed=0):
    """Two linear layers on random data: weights, and a loss of some curvature in ``autocast``."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8)).to(dtype)
    inputs, targets = torch.randn(64, 32), torch.randn(64, 8)

    def loss():
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            return (model(inputs.to(dtype if autocast is None else torch.float32)).float() - targets).square().mean()

    return model, loss


def wrapped(model, lr=0.0, **settings):
    return GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=lr), strength=0.1, **settings)


LOW = {"bf16 weights": {"dtype": torch.bfloat16}, "autocast": {"autocast": torch.bfloat16}}


@pytest.mark.parametrize("low", LOW.values(), ids=LOW)
@pytest.mark.parametrize("drive", ["closure", "passes"])
def test_default_in_low_precision(low, drive):
    """A first step of 0.005, which is checked; ε follows from it. The loss is computed 4 times, then 2 times a step."""
    model, loss = problem(**low)
    optimizer, calls = wrapped(model), []

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    def step():
        if drive == "closure":
            optimizer.step(closure)
            return
        for _ in optimizer.passes():
            closure()
        optimizer.step()

    step()
    metrics = optimizer.metrics
    assert metrics["radius"] == START
    assert float(metrics["eps"]) == pytest.approx(START / float(metrics["g1_norm"]))
    assert metrics["noise_floor"] > 0
    assert len(calls) == 4
    step()
    assert optimizer.metrics["radius"] != START
    assert len(calls) == 6


FULL = {"fp32": ({}, {})}
GIVEN = {f"{low}, {name}": (LOW[low], {name: value}) for low in LOW for name, value in (("eps", 1e-3), ("radius", 0.01))}


@pytest.mark.parametrize(("low", "settings"), [*FULL.values(), *GIVEN.values()], ids=[*FULL, *GIVEN])
def test_where_it_does_not_apply(low, settings):
    """Full precision keeps the published ε, and a length that was given is kept everywhere."""
    model, loss = problem(**low)
    optimizer = wrapped(model, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step(closure_of(optimizer, loss))
    assert "radius" not in optimizer.metrics
    assert optimizer.param_groups[0]["gradreg_auto_radius"] is None
    if "radius" not in settings:
        assert optimizer.metrics["eps"] == 1e-3


@pytest.mark.parametrize("method", ["forward", "central"])
@pytest.mark.parametrize("low", LOW.values(), ids=LOW)
def test_it_finds_the_balance(low, method):
    """The difference ends where its noise and its changing curvature balance, on one batch, by steps of bounded size."""
    model, loss = problem(**low)
    optimizer = wrapped(model, method=method)
    radii = []
    for _ in range(15):
        optimizer.step(closure_of(optimizer, loss))
        radii.append(float(optimizer.metrics["radius"]))
    floor = optimizer.metrics["noise_floor"] * (0.5 if method == "central" else 1.0)
    relative = floor / math.sqrt(1 - float(optimizer.metrics["signal"]))
    assert relative == pytest.approx(balanced(floor, 2 if method == "central" else 1), rel=0.15)
    factors = [b / a for a, b in itertools.pairwise(radii)]
    assert all(0.5 <= factor <= 2 for factor in factors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_asked_for_in_full_precision(dtype):
    """There it is checked as well, by steps of a hundredth, and ends at a shorter step."""
    model, loss = problem(dtype)
    optimizer = wrapped(model, radius="auto")
    for _ in range(15):
        optimizer.step(closure_of(optimizer, loss))
    assert 0 < optimizer.metrics["radius"] < 10 * START
    assert optimizer.metrics["signal"] > 0.99
    assert optimizer.param_groups[0]["gradreg_eps"] is None


@pytest.mark.parametrize("low", LOW.values(), ids=LOW)
def test_resumed_bit_for_bit(low):
    """What was found is in the groups: a checkpoint in the middle changes nothing."""
    (model, loss), (other, loss_of_other) = problem(**low), problem(**low)
    optimizer = wrapped(model, lr=0.05)
    for _ in range(4):
        optimizer.step(closure_of(optimizer, loss))
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed = wrapped(other, lr=0.05)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(3):
        optimizer.step(closure_of(optimizer, loss))
        resumed.step(closure_of(resumed, loss_of_other))
        assert resumed.metrics["radius"] == optimizer.metrics["radius"]
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_a_checkpoint_from_before():
    """One without what was found: silently a first step; its ε was a setting and stays one."""
    model, loss = problem(torch.bfloat16)
    optimizer = wrapped(model)
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        del group["gradreg_auto_radius"]
        group["gradreg_eps"], group["gradreg_radius"] = 1e-3, None
    optimizer.load_state_dict(state)
    with pytest.warns(UserWarning, match="self-check"):
        optimizer.step(closure_of(optimizer, loss))
    assert optimizer.metrics["eps"] == 1e-3


def test_eps_written_into_a_group_counts():
    """Whoever writes the length of the step into a group gets it."""
    model, loss = problem(torch.bfloat16)
    optimizer = wrapped(model, check_every=0)
    optimizer.param_groups[0]["gradreg_eps"] = 0.05
    optimizer.step(closure_of(optimizer, loss))
    assert optimizer.metrics["eps"] == 0.05
    assert "radius" not in optimizer.metrics


def test_groups_with_lengths_of_their_own():
    """One group's radius finds itself, and the other keeps its ε."""
    model, loss = problem(torch.bfloat16)
    groups = [
        {"params": list(model[0].parameters())},
        {"params": list(model[2].parameters()), "gradreg_eps": 0.02},
    ]
    optimizer = GradRegOptimizer(torch.optim.SGD(groups, lr=0.0), strength=0.1)
    for _ in range(3):
        optimizer.step(closure_of(optimizer, loss))
    assert optimizer.metrics["radius"] != START
    assert [(group["gradreg_eps"], group["gradreg_radius"]) for group in optimizer.param_groups] == [
        (None, None),
        (0.02, None),
    ]


def test_a_step_that_is_swallowed_grows():
    """Bf16-exact weights under autocast, which would round a short step away: nobody has to choose a longer one."""
    model, loss = problem(autocast=torch.bfloat16)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float() * 64
    optimizer = wrapped(model)
    for _ in range(12):
        optimizer.step(closure_of(optimizer, loss))
    assert optimizer.metrics["radius"] > 4 * START
    assert optimizer.param_groups[0]["gradreg_floor"] is not None


def test_what_is_said():
    """Nothing while the radius can mend it; once it had time to, the remedies that are left."""
    assert advice(0.1, 0.1, 0.12, 1e-3, 0.01, is_settled=False) is None
    message = advice(0.1, 0.1, 0.12, 1e-3, 0.01, is_settled=True)
    assert "fp16 in place of bf16 in the passes, or method='central'" in message
    assert "set radius" not in message
    assert advice(0.1, 0.01, 0.5, 1e-3, 0.01, is_settled=True) is None
    # Both sides disagree.
    assert "the self-check is -0.90" in advice(-0.9, 0.01, 0.5, 1e-3, 0.01, is_settled=True)
    assert too_short("", 1e-3, 0.01, False) is None
    assert "A step 1 long" in too_short("", 1e-3, MOST, True)


def test_the_rule():
    """In the balance nothing changes; far from it by a factor of two; where nothing is known, nothing."""
    wanted, noise = balanced(0.04, 1) ** 2 - 0.04**2, 0.04**2

    def after(square, radius=0.01):
        return float(following(radius, torch.as_tensor(square), 0.04, 1))

    assert after(wanted + noise) == pytest.approx(0.01)
    assert after(4 * wanted + noise) == pytest.approx(0.01 / math.sqrt(2))
    assert after(wanted / 4 + noise) == pytest.approx(0.01 * math.sqrt(2))
    assert after(math.inf) == pytest.approx(0.005)
    assert after(1.0) == pytest.approx(0.005, rel=0.3)
    assert [after(square) for square in (noise, noise / 2, 0.0)] == pytest.approx([0.02] * 3)
    assert after(math.nan) == pytest.approx(0.01)
    assert after(0.0, 0.9) == longer(0.9) == MOST
    assert [balanced(0.04, order) for order in (1, 2)] == pytest.approx([0.14, 0.239], abs=1e-3)
    assert balanced(0.5, 1) == 0.75


def test_not_a_number_leaves_the_radius_as_it_is():
    """A step without a finite gradient tells nothing about the next one's length."""
    model, loss = problem(torch.bfloat16)
    optimizer, factor = wrapped(model), [1.0]
    closure = closure_of(optimizer, lambda: loss() * factor[0])
    for _ in range(3):
        optimizer.step(closure)
    before = optimizer.param_groups[0]["gradreg_auto_radius"]
    factor[0] = math.inf
    optimizer.step(closure)
    assert optimizer.param_groups[0]["gradreg_auto_radius"] == before


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("0.01", 0.01), ("1e-2", 0.01)])
def test_as_a_flag(text, value):
    """A word or a number."""
    parser = pytest.importorskip("transformers", reason="flags are parsed by Transformers").HfArgumentParser
    [config] = parser(GradRegConfig).parse_args_into_dataclasses(["--grad_reg_radius", text])
    assert config.kwargs()["radius"] == value
    [config] = parser(GradRegConfig).parse_args_into_dataclasses([])
    optimizer = wrapped(problem()[0], **{k: v for k, v in config.kwargs().items() if k != "strength"})
    assert optimizer.param_groups[0]["gradreg_radius"] is None  # which precision decides
    with pytest.raises(ValueError, match="must be None, 'auto' or a finite number > 0"):
        GradRegConfig(grad_reg_radius="automatic")


def test_both_lengths_given():
    """An ε of one's own beside it is an error: both set the length of the same step."""
    with pytest.raises(ValueError, match=r"eps=0.01 and radius='auto': both set the length"):
        wrapped(problem()[0], eps=0.01, radius="auto")
