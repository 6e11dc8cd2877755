"""Low precision is noticed in the passes themselves, wherever it was chosen, and checks begin in the same step."""

import copy
import warnings

import pytest
import torch
from gradreg_optim.core.losses import low_dtype_behind
from problems import closure_of, regression, weights
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradreg_optim import GradRegOptimizer, MicroBatches
from gradreg_optim.core import losses


def under_autocast(model, loss):
    def inside():
        with torch.autocast("cpu", torch.bfloat16):
            return loss(model)

    return inside


def with_a_frozen_half(model, loss):
    half = nn.Linear(2, 2).bfloat16().requires_grad_(False)
    return lambda: loss(lambda inputs: half(model(inputs).bfloat16()).float())


def reentrant(model, loss):
    def inside(inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return model(inputs)

    return lambda: loss(lambda inputs: checkpoint(inside, inputs.requires_grad_(), use_reentrant=True))


def as_it_is(model, loss):
    return lambda: loss(model)


def problem(kind, **settings):
    model, loss = regression(dtype=torch.float32)
    optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), radius=0.05, **settings)
    return model, optimizer, kind(model, loss)


def checked(optimizer, step, count):
    """In which of so many steps there was a check, whatever it said."""
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(count):
            step()
            found.append("self_check" in optimizer.metrics)
    return found


@pytest.mark.parametrize("kind", [under_autocast, with_a_frozen_half, reentrant])
def test_in_a_closure(kind):
    """The step in which it is seen is checked, the next one is not; nothing is if the user says so."""
    for every, expected in ((None, [True, False]), (0, [False, False])):
        _, optimizer, loss = problem(kind, check_every=every)
        closure = closure_of(optimizer, loss)
        assert checked(optimizer, lambda optimizer=optimizer, closure=closure: optimizer.step(closure), 2) == expected
        assert closure.calls == (6 if every is None else 4)


def test_in_passes_and_micro_batches():
    """Other drivers of the same step."""
    _, optimizer, loss = problem(under_autocast)

    def loop():
        for _ in optimizer.passes():
            optimizer.zero_grad()
            loss().backward()
        optimizer.step()

    assert checked(optimizer, loop, 2) == [True, False]
    _, optimizer, loss = problem(under_autocast, warmup_steps=1)
    batches = MicroBatches(lambda _: loss().backward(), [0, 1])
    assert checked(optimizer, lambda: optimizer.step(batches), 3) == [False, True, False]


def test_single_precision_is_not_checked():
    """Nor does it cost anything."""
    _, optimizer, loss = problem(as_it_is)
    assert checked(optimizer, lambda: optimizer.step(closure_of(optimizer, loss)), 2) == [False, False]


def test_later_checks_after_a_resumption():
    """A run that is resumed notices anew, and checks when the uninterrupted one does: to the bit the same."""
    model, optimizer, loss = problem(under_autocast)
    closure = closure_of(optimizer, loss)
    checked(optimizer, lambda: optimizer.step(closure), 1)
    for group in optimizer.param_groups:
        group["gradreg_step"] = 97
    checked(optimizer, lambda: optimizer.step(closure), 1)
    saved, at_save = copy.deepcopy(optimizer.state_dict()), weights(model)
    assert checked(optimizer, lambda: optimizer.step(closure), 4) == [False, False, True, False]
    expected = weights(model)
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), at_save, strict=True):
            parameter.copy_(value)
    resumed = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), radius=0.05)
    resumed.load_state_dict(saved)
    again = closure_of(resumed, loss)
    assert checked(resumed, lambda: resumed.step(again), 4) == [False, False, True, False]
    assert all(map(torch.equal, weights(model), expected))


def test_how_far_a_graph_is_looked_at(monkeypatch):
    """Each node once, and so many at most."""
    x = torch.ones(3, requires_grad=True)
    deep = x.bfloat16().float()
    for _ in range(40):
        deep = deep + deep  # 2^40 paths
    assert low_dtype_behind([deep.sum()]) is torch.bfloat16
    assert low_dtype_behind([torch.autograd.graph.get_gradient_edge(deep)]) is torch.bfloat16
    assert low_dtype_behind([x.detach().sum(), x.half().sum()]) is torch.float16
    monkeypatch.setattr(losses, "NODES", 10)
    assert low_dtype_behind([deep.sum()]) is None
