"""``every=k``: which steps are regularized, and what those between them use."""

import copy
import io

import pytest
import torch
from problems import assert_same, closure_of, regression, twin_of, weights
from torch import nn

from gradreg_optim import GradRegOptimizer

SETTINGS = {"strength": 0.3, "eps": 1e-4, "g1_clip": None, "g2_clip": None}


def trained(steps, model, loss, base=torch.optim.SGD, **settings):
    optimizer = GradRegOptimizer(base(model.parameters(), lr=0.05), **{**SETTINGS, **settings})
    closure = closure_of(optimizer, loss)
    calls = []
    for _ in range(steps):
        before = closure.calls
        optimizer.step(closure)
        calls.append(closure.calls - before)
    return optimizer, calls


def product(parameters, loss, direction):
    """H·direction by double backward."""
    g1 = torch.autograd.grad(loss(), parameters, create_graph=True)
    return torch.autograd.grad(sum((g * d).sum() for g, d in zip(g1, direction, strict=True)), parameters)


def test_each_kth_step_takes_the_second_gradient():
    """Counted from the end of the warm-up; the others cost one gradient."""
    assert trained(7, *regression(), every=3)[1] == [2, 1, 1, 2, 1, 1, 2]
    assert trained(7, *regression(), every=3, warmup_steps=2)[1] == [1, 1, 2, 1, 1, 2, 1]
    assert trained(3, *regression())[1] == [2, 2, 2]


def test_plain_steps_between_are_those_of_the_wrapped_optimizer():
    """Bit for bit: a regularized step by hand, then two of the bare optimizer, are three of ``every=3``."""
    model, loss = regression()
    twin, twin_loss = twin_of(model, loss)
    trained(3, model, loss, every=3)
    optimizer, _ = trained(1, twin, twin_loss)
    for _ in range(2):
        closure_of(optimizer, twin_loss)()
        optimizer.optimizer.step()
    assert_same(weights(model), weights(twin))


def test_reuse_along_the_gradient_is_todays_and_across_it_the_last_ones():
    """g + γ·(c·g + ‖g‖·v), with c and v of the last regularized step, by double backward."""
    model, loss = regression()
    parameters = list(model.parameters())
    first = [g.detach() for g in torch.autograd.grad(loss(), parameters)]
    h = product(parameters, loss, first)
    flat_h, flat_g = (nn.utils.parameters_to_vector(x) for x in (h, first))
    along = flat_h @ flat_g / flat_g.square().sum()
    across = (flat_h - along * flat_g) / flat_g.norm()
    optimizer, _ = trained(1, model, loss, every=2, between="reuse", method="exact")
    closure_of(optimizer, loss)()
    today = nn.utils.parameters_to_vector([p.grad for p in parameters]).clone()
    assert optimizer.reuses
    optimizer.reuse_()
    combined = nn.utils.parameters_to_vector([p.grad for p in parameters])
    torch.testing.assert_close(combined, today + 0.3 * (along * today + today.norm() * across), rtol=1e-10, atol=1e-12)
    assert optimizer.metrics["strength"] == 0.3


@pytest.mark.parametrize("method", ["forward", "central", "exact"])
def test_reuse_at_the_same_point_is_the_regularized_step(method):
    """Where nothing has moved, the penalty that is used again is the one that was computed."""
    model, loss = regression()
    optimizer = GradRegOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0), **SETTINGS, every=2, between="reuse", method=method
    )
    closure = closure_of(optimizer, loss)
    optimizer.step(closure)
    computed = [p.grad.clone() for p in model.parameters()]
    optimizer.step(closure)
    assert closure.calls == (4 if method == "central" else 3)
    torch.testing.assert_close([p.grad for p in model.parameters()], computed, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_reuse_resumes_bit_for_bit(base):
    """The penalty is in the checkpoint: a run that was stopped between two regularized steps goes on as it would have."""
    model, loss = regression()
    optimizer, _ = trained(5, model, loss, base, every=4, between="reuse")
    saved = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, saved)
    saved.seek(0)
    state = torch.load(saved)
    resumed, resumed_loss = twin_of(model, loss)
    other = GradRegOptimizer(base(resumed.parameters(), lr=0.05), **SETTINGS, every=4, between="reuse")
    resumed.load_state_dict(state["model"])
    other.load_state_dict(state["optimizer"])
    for now, then in ((optimizer, loss), (other, resumed_loss)):
        now.step(closure_of(now, then))
    if base is torch.optim.AdamW:
        assert_same(weights(model), weights(resumed))
    else:  # an optimizer without state has no place for it: plain along the gradient until the next regularized step
        assert all(p.isfinite().all() for p in resumed.parameters())


def test_reuse_survives_pickling():
    """With an optimizer that keeps no state, too."""
    model, loss = regression()
    optimizer, _ = trained(1, model, loss, every=2, between="reuse")
    other, other_model = copy.deepcopy((optimizer, model))
    other_loss = twin_of(other_model, loss)[1]
    other_loss = lambda: loss(other_model)  # noqa: E731
    for now, then in ((optimizer, loss), (other, other_loss)):
        now.step(closure_of(now, then))
    assert_same(weights(model), weights(other_model))


def test_a_skipped_second_gradient_leaves_the_last_penalty():
    """No NaN is kept for later steps."""
    model, loss = regression()
    optimizer, _ = trained(1, model, loss, every=2, between="reuse")
    kept = optimizer.param_groups[0]["gradreg_along"]
    calls = iter([1.0, 1.0, float("inf"), 1.0])
    for _ in range(3):
        optimizer.step(closure_of(optimizer, lambda: loss() * next(calls)))
    assert optimizer.param_groups[0]["gradreg_along"] == kept
    assert all(p.isfinite().all() for p in model.parameters())
