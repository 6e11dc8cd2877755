"""The further points: there, and back without a trace."""

import random
from contextlib import contextmanager, suppress

import numpy
import pytest
import torch
from problems import assert_same
from torch import nn

from gradreg_optim.core.local import LocalStorage
from gradreg_optim.core.same_start import RandomState

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@contextmanager
def shifted(weights, direction, steps, **given):
    """The parameters of each group, moved along what is in their ``.grad``; yields what the storage took there."""
    for group, along in zip(weights, direction, strict=True):
        for parameter, gradient in zip(group, along, strict=True):
            parameter.grad = gradient
    storage = LocalStorage([{"params": group} for group in weights])
    first = storage.take([1.0] * len(weights), [frozenset()] * len(weights))
    with storage.moved(first, steps, **{"seed": None, "measured": False, **given}):
        yield first


def parameter(*shape, dtype=torch.float32):
    return nn.Parameter(torch.randn(*shape).to(dtype))


def values(parameters):
    return [value.detach().clone() for value in parameters]


@pytest.mark.parametrize("dtype", DTYPES)
def test_inside_the_block_the_weights_stand_at_the_second_point(dtype):
    """θ' = θ + ε·d with each group's own ε, and how much of the step arrived is measured from copies of θ."""
    theta = [parameter(3, 2, dtype=dtype), parameter(4, dtype=dtype)]
    d = [torch.randn(3, 2).to(dtype), torch.randn(4).to(dtype)]
    before = values(theta)
    with shifted([[theta[0]], [theta[1]], []], [[d[0]], [d[1]], []], [0.5, 0.25, 1.0], measured=True) as first:
        there = [torch.add(before[0], d[0], alpha=0.5), torch.add(before[1], d[1], alpha=0.25)]
        assert_same(values(theta), there)
        found = [(group.moved_along, group.step_squared) for group in first.groups]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        moved = [(b.to(wide) - a.to(wide)).flatten() for a, b in zip(before, there, strict=True)]
        along = [x.to(wide).flatten() for x in d]
        expected = [*((m @ x, x @ x) for m, x in zip(moved, along, strict=True)), (0.0, 0.0)]
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)  # order of summation
    assert_same(values(theta), before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_adding_and_subtracting_would_not_restore(dtype):
    """The weights come back by copy: for these numbers θ + ε·d − ε·d is not θ."""
    theta, d = parameter(1000, dtype=dtype), torch.randn(1000).to(dtype)
    before = values([theta])
    assert (torch.add(torch.add(before[0], d, alpha=0.1), d, alpha=-0.1) != before[0]).any()
    with shifted([[theta]], [[d]], [0.1]):
        pass
    assert_same(values([theta]), before)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_restores(error):
    """Whatever leaves the block, the weights are back, and the exception goes on."""
    theta = parameter(3)
    before = values([theta])
    with pytest.raises(error), shifted([[theta]], [[torch.randn(3)]], [0.1]):
        raise error
    assert_same(values([theta]), before)


def test_a_shift_that_fails_halfway_restores():
    """An error in the second group's shift takes the first group's back."""
    theta = [parameter(3), parameter(3)]
    before = values(theta)
    with (
        pytest.raises(TypeError),
        shifted([[theta[0]], [theta[1]]], [[torch.randn(3)], [torch.randn(3)]], [0.1, "long"]),
    ):
        pass
    assert_same(values(theta), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_direction_that_is_not_finite_restores(value):
    """NaN + x − NaN would stay NaN; a copy does not."""
    theta = parameter(3)
    before = values([theta])
    with shifted([[theta]], [[torch.full((3,), value)]], [0.1]):
        assert not theta.isfinite().any()
    assert_same(values([theta]), before)


def draw():
    return random.random(), numpy.random.rand(), torch.rand(()).item()


def test_the_same_random_numbers_again():
    """Python's, NumPy's and torch's generators give the second pass what they gave the first."""
    state = RandomState()
    first = draw()
    with state.replayed():
        assert draw() == first
        draw()  # the second pass may draw more than the first did


def test_after_the_block_the_generators_go_on_as_if_it_had_not_been():
    """Training goes on with the numbers it would have had without a second pass."""
    draw()
    expected = draw()
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    state = RandomState()
    draw()
    with suppress(KeyboardInterrupt), state.replayed():
        draw()
        raise KeyboardInterrupt
    assert draw() == expected


def test_restoring_twice():
    """A recorded state can be returned to as often as there are micro-batches."""
    state = RandomState()
    first = draw()
    for _ in range(2):
        state.restore()
        assert draw() == first


def test_autocast_around_the_step_does_not_hide_the_second_point():
    """Under autocast around both passes the second runs on the moved weights, not on cached bf16 copies of the first's."""
    model, inputs = nn.Linear(4, 4), torch.randn(8, 4)
    with torch.autocast("cpu", torch.bfloat16):
        before = model(inputs)
        with shifted([[model.weight]], [[torch.ones(4, 4)]], [1.0]):
            moved = model(inputs)
        after = model(inputs)
    assert not torch.equal(moved, before)
    assert torch.equal(after, before)
