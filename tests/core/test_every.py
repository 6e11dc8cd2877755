"""``every=k``: which steps are regularized, and that those between them are plain."""

import torch
from problems import assert_same, closure_of, regression, twin_of, unchecked, weights

SETTINGS = {"strength": 0.3, "eps": 1e-4, "g1_clip": None, "g2_clip": None}


def trained(steps, model, loss, **settings):
    optimizer = unchecked(torch.optim.SGD(model.parameters(), lr=0.05), **{**SETTINGS, **settings})
    closure = closure_of(optimizer, loss)
    calls = []
    for _ in range(steps):
        before = closure.calls
        optimizer.step(closure)
        calls.append(closure.calls - before)
    return optimizer, calls


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
