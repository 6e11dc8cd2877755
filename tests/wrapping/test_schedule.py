"""Strength over time."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradreg_optim.wrapping.schedule import NAMES, strength_factor

LENGTHS = st.integers(1, 50)
WARMUPS = st.integers(0, 50)


@pytest.mark.parametrize("schedule", [None, *NAMES, lambda step: 1.0])
@given(warmup=WARMUPS, length=LENGTHS)
def test_nothing_during_the_warmup(schedule, warmup, length):
    """Exactly the first ``warmup_steps`` steps have the factor 0, whatever the schedule."""
    factors = [
        strength_factor(step, warmup_steps=warmup, schedule=schedule, schedule_steps=length) for step in range(warmup + 3)
    ]
    assert factors[:warmup] == [0.0] * warmup
    assert all(factor > 0 for factor in factors[warmup:])


@pytest.mark.parametrize("schedule", [None, "constant"])
def test_constant_is_one(schedule):
    """Without a schedule the strength is what was given, from the first step on."""
    assert [strength_factor(step, schedule=schedule) for step in range(3)] == [1.0, 1.0, 1.0]


def test_linear_by_hand():
    """A rise over four steps takes a quarter at a time."""
    assert [strength_factor(step, schedule="linear", schedule_steps=4) for step in range(5)] == [
        0.25,
        0.5,
        0.75,
        1.0,
        1.0,
    ]


def test_cosine_by_hand():
    """A rise over two steps is (1 − cos(π/2))/2, then 1."""
    factors = [strength_factor(step, schedule="cosine", schedule_steps=2) for step in range(3)]
    assert factors == [pytest.approx(0.5, abs=1e-15), 1.0, 1.0]  # cos(π/2) is 6e-17 in floating point


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@given(warmup=WARMUPS, length=LENGTHS)
def test_named_schedules_rise_to_one_and_stay(schedule, warmup, length):
    """Both rise monotonically over ``schedule_steps`` steps after the warm-up and end at exactly 1."""
    steps = range(warmup, warmup + length + 2)
    factors = [strength_factor(step, warmup_steps=warmup, schedule=schedule, schedule_steps=length) for step in steps]
    assert all(0 < a < b for a, b in itertools.pairwise(factors[:length]))
    assert factors[length - 1 :] == [1.0, 1.0, 1.0]


def test_a_callable_gets_the_step_counted_from_the_very_first():
    """The warm-up does not shift the number that a callable sees."""
    assert [strength_factor(step, warmup_steps=2, schedule=lambda step: 10 * step) for step in range(4)] == [
        0,
        0,
        20,
        30,
    ]


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_a_factor_must_be_finite_and_not_negative(value):
    """A callable that leaves the range is an error in the step in which it does."""
    with pytest.raises(ValueError, match="schedule"):
        strength_factor(0, schedule=lambda step: value)
