"""The outside: one real optimizer to LR schedulers, hooks, and everybody who holds on to its groups."""

import copy

import pytest
import torch
from problems import assert_same, by_closure, by_loop, closure_of, regression, twin_of, unchecked, weights
from torch import nn
from torch.optim import Optimizer, lr_scheduler, swa_utils
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

SCHEDULERS = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda step: 0.9),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 2),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [1, 3]),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, 0.5, 2),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, 0.25, 1.0, 4),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.5),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, 4),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 4),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 2),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 0.01, 0.1, 2),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 0.1, 6),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=0, threshold=10.0, threshold_mode="abs"),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.ConstantLR(opt, 0.5, 2), lr_scheduler.ExponentialLR(opt, 0.5)], [2]
    ),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(opt, 0.5, 2), lr_scheduler.ExponentialLR(opt, 0.5)], opt
    ),
    "SWALR": lambda opt: swa_utils.SWALR(opt, 0.01, anneal_epochs=3),
}


def test_every_scheduler_of_torch_is_in_the_table():
    """A scheduler that torch adds is noticed."""
    names = {
        name
        for name, entry in vars(lr_scheduler).items()
        if isinstance(entry, type) and issubclass(entry, lr_scheduler.LRScheduler) and not name.endswith("LRScheduler")
    }
    assert names | {"SWALR"} == set(SCHEDULERS)


@pytest.mark.parametrize("build", SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize("on", ["wrapper", "base"])
# Torch 2.6's SequentialLR passes it to others.
@pytest.mark.filterwarnings("ignore:The epoch parameter in:UserWarning")
def test_schedulers(build, on):
    """Built on the wrapper or on the base optimizer, every scheduler gives the learning rates it gives the bare one."""
    model, loss = regression()
    other, other_loss = twin_of(model, loss)
    inner = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = unchecked(inner, strength=0.1, eps=0.1)
    scheduler = build(optimizer if on == "wrapper" else inner)
    bare = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9)
    bare_scheduler = build(bare)
    rates = []
    for _ in range(5):
        optimizer.step(closure_of(optimizer, loss))
        bare.step(closure_of(bare, other_loss))
        for current in (scheduler, bare_scheduler):
            current.step(*([1.0] if isinstance(current, lr_scheduler.ReduceLROnPlateau) else []))
        rates.append(bare.param_groups[0]["lr"])
        assert optimizer.param_groups[0]["lr"] == rates[-1]
        assert optimizer.param_groups[0]["momentum"] == bare.param_groups[0]["momentum"]
    assert len({0.05, *rates}) > 1


def test_the_rate_of_a_scheduler_reaches_the_step():
    """With the rate at 0 nothing moves: the step reads the rate that the scheduler wrote."""
    model, loss = regression()
    optimizer = unchecked(torch.optim.SGD(model.parameters(), lr=0.5))
    lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = weights(model)
    optimizer.step(closure_of(optimizer, loss))
    assert_same(weights(model), before)


def test_a_saved_scheduler_resumes():
    """Scheduler and optimizer resume together, bit for bit."""
    model, loss = regression()
    other, other_loss = twin_of(model, loss)
    pairs = []
    for current in (model, other):
        optimizer = unchecked(torch.optim.SGD(current.parameters(), lr=0.1))
        pairs.append((optimizer, lr_scheduler.CosineAnnealingLR(optimizer, 6)))
    (optimizer, scheduler), (resumed, resumed_scheduler) = pairs
    for _ in range(3):
        optimizer.step(closure_of(optimizer, loss))
        scheduler.step()
    other.load_state_dict(model.state_dict())
    resumed_scheduler.load_state_dict(scheduler.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    for current, its_scheduler, its_loss in (
        (optimizer, scheduler, loss),
        (resumed, resumed_scheduler, other_loss),
    ):
        for _ in range(3):
            current.step(closure_of(current, its_loss))
            its_scheduler.step()
    assert_same(weights(other), weights(model))


def test_it_is_an_optimizer_that_shares_everything():
    """One isinstance check, one list of groups, one state, one set of defaults: nothing can diverge."""
    model, _ = regression()
    inner = torch.optim.AdamW(model.parameters(), lr=0.1)
    optimizer = unchecked(inner)
    assert isinstance(optimizer, Optimizer)
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.state is inner.state
    assert optimizer.defaults is inner.defaults
    inner.load_state_dict(optimizer.state_dict())  # replaces the lists on the inner optimizer
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.state is inner.state


def test_replaced_groups_reach_the_base_optimizer():
    """DeepSpeed swaps ``param_groups`` before it calls the optimizer once a group: each group is then stepped once."""
    w, v = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    inner = torch.optim.SGD([{"params": [w]}, {"params": [v]}], lr=0.5)
    optimizer = unchecked(inner, strength=0.0)
    groups = optimizer.param_groups
    for group in groups:
        optimizer.param_groups = [group]
        assert inner.param_groups == [group]
        optimizer.step(closure_of(optimizer, lambda p=group["params"][0]: p.sum()))
    optimizer.param_groups = groups
    assert (w.item(), v.item()) == (0.5, 0.5)
    optimizer.state = state = copy.copy(inner.state)
    assert inner.state is state
    optimizer.defaults = defaults = dict(inner.defaults)
    assert inner.defaults is defaults


def test_step_hooks_on_wrapper_and_base():
    """Hooks of either run once a step: the wrapper's around both passes, the base optimizer's around the update."""
    model, loss = regression()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = unchecked(inner)
    order = []
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: order.append(("before", opt)))
    optimizer.register_step_post_hook(lambda opt, args, kwargs: order.append(("after", opt)))
    inner.register_step_pre_hook(lambda opt, args, kwargs: order.append(("before", opt)))
    inner.register_step_post_hook(lambda opt, args, kwargs: order.append(("after", opt)))
    optimizer.step(closure_of(optimizer, lambda: (order.append(("pass", None)), loss())[1]))
    assert order == [
        ("before", optimizer),
        ("pass", None),
        ("pass", None),
        ("before", inner),
        ("after", inner),
        ("after", optimizer),
    ]


def test_hooks_can_be_removed_and_replace_arguments():
    """A pre-hook may bring the closure; a removed hook runs no more."""
    model, loss = regression()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = unchecked(inner)
    closure = closure_of(optimizer, loss)
    handle = optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt, closure), {}))
    optimizer.step()
    assert closure.calls == 2
    handle.remove()
    with pytest.raises(RuntimeError, match="closure"):
        optimizer.step()


def with_scaler(optimizer, loss):
    optimizer._scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def closure():
        optimizer.zero_grad()
        optimizer._scaler.scale(loss()).backward()

    optimizer.step(closure)


@pytest.mark.parametrize("take_step", [by_closure, by_loop, with_scaler])
def test_hooks_on_every_optimizer_see_the_wrapper_once(take_step):
    """An average of the weights in such a hook moves once a step, after the update, which hooks of the base are around."""
    model, loss = regression()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer, seen, start = unchecked(inner), [], weights(model)
    inner.register_step_post_hook(lambda opt, args, kwargs: seen.append(("update", opt)))

    def moved():
        return not torch.equal(start[0], weights(model)[0])

    handles = [
        register_optimizer_step_pre_hook(lambda opt, args, kwargs: seen.append(("before", opt, moved()))),
        register_optimizer_step_post_hook(lambda opt, args, kwargs: seen.append(("after", opt, moved()))),
    ]
    try:
        take_step(optimizer, loss)
        assert seen == [("before", optimizer, False), ("update", inner), ("after", optimizer, True)]
        seen.clear()
        inner.step()  # the base optimizer in other hands
        assert seen == [("before", inner, True), ("update", inner), ("after", inner, True)]
    finally:
        for handle in handles:
            handle.remove()
    take_step(optimizer, loss)
    assert len(seen) == 4  # a removed hook does not come back


def test_hooks_on_every_optimizer_see_another_one_in_the_closure():
    """A closure that steps another optimizer, as for a discriminator, does so with its hooks; an error restores them."""
    model, loss = regression()
    other = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    optimizer, seen = unchecked(torch.optim.SGD(model.parameters(), lr=0.1)), []
    closure = closure_of(optimizer, lambda: (other.step(), loss())[1])
    handle = register_optimizer_step_post_hook(lambda opt, args, kwargs: seen.append(opt))
    try:
        optimizer.step(closure)
        assert seen == [other, other, optimizer]
        optimizer.optimizer.register_step_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            optimizer.step(closure)
        other.step()
        assert seen[3:] == [other, other, other]
    finally:
        handle.remove()


def test_a_profiler_sees_one_step():
    """The range ``Optimizer.step#…`` is the wrapped optimizer's, as without the wrapper."""
    model, loss = regression()
    optimizer = unchecked(torch.optim.SGD(model.parameters(), lr=0.1))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step(closure_of(optimizer, loss))
    steps = {event.key: event.count for event in profile.key_averages() if event.key.startswith("Optimizer.step#")}
    assert steps == {"Optimizer.step#SGD.step": 1}


def test_an_average_kept_by_a_scheduler_moves_once():
    """An LR scheduler and an averaged model stepped by hooks on either optimizer count the steps of the loop."""
    for on in ("wrapper", "base"):
        model, loss = regression()
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer, averaged = unchecked(inner), swa_utils.AveragedModel(model)
        holder = optimizer if on == "wrapper" else inner
        scheduler = lr_scheduler.StepLR(holder, 1, gamma=0.5)
        holder.register_step_post_hook(lambda *_, a=averaged, m=model, s=scheduler: (a.update_parameters(m), s.step())[:0])
        for _ in range(3):
            optimizer.step(closure_of(optimizer, loss))
        assert int(averaged.n_averaged) == 3
        assert inner.param_groups[0]["lr"] == 0.1 * 0.5**3


def test_clearing_gradients():
    """zero_grad clears every group's gradients, to None or to zero, and a zeroed ``.grad`` does not erase g1."""
    model, loss = regression()
    other, other_loss = twin_of(model, loss)
    optimizer, expected = (
        unchecked(torch.optim.SGD(current.parameters(), lr=0.1), strength=0.1) for current in (model, other)
    )

    def closure():
        optimizer.zero_grad(set_to_none=False)
        value = loss()
        value.backward()
        return value

    for _ in range(3):
        optimizer.step(closure)
        expected.step(closure_of(expected, other_loss))
    assert_same(weights(model), weights(other))
    optimizer.zero_grad(set_to_none=False)
    assert all((parameter.grad == 0).all() for parameter in model.parameters())
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_closure_that_does_not_clear_gradients():
    """Gradients are taken away before the second pass: cleared before the step is enough."""
    model, loss = regression()
    other, other_loss = twin_of(model, loss)
    optimizer, expected = (
        unchecked(torch.optim.SGD(current.parameters(), lr=0.1), strength=0.1) for current in (model, other)
    )

    def closure():
        value = loss()
        value.backward()
        return value

    for _ in range(2):
        optimizer.zero_grad()
        optimizer.step(closure)
        expected.step(closure_of(expected, other_loss))
    assert_same(weights(model), weights(other))


def test_another_backward_before_gradients_are_cleared():
    """A closure may run another network's backward before it clears: the wrapper's own gradients are not added to."""
    model, loss = regression()
    _, other_loss = regression()
    optimizer = unchecked(torch.optim.SGD(model.parameters(), lr=0.1))
    loss().backward()

    def closure():
        other_loss().backward()
        optimizer.zero_grad()
        loss().backward()

    optimizer.step(closure)
    assert optimizer.step_count == 1


def test_public_attributes_of_the_base_optimizer():
    """What the base optimizer offers is there; its private flags are not, and a missing name is an AttributeError."""

    class ScheduleFree(torch.optim.SGD):
        mode = None

        def train(self):
            self.mode = "train"

        def eval(self):
            self.mode = "eval"

    inner = ScheduleFree([nn.Parameter(torch.ones(1))], lr=0.1)
    optimizer = unchecked(inner)
    optimizer.eval()
    assert inner.mode == "eval"
    optimizer.train()
    assert inner.mode == "train"
    inner._step_supports_amp_scaling = True
    assert not hasattr(optimizer, "_step_supports_amp_scaling")
    assert not hasattr(optimizer, "no_such_name")
    assert not hasattr(unchecked(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)), "train")


def test_its_repr_shows_the_settings():
    """Groups print with their regularization."""
    text = repr(unchecked(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), strength=0.25))
    assert text.startswith("GradRegOptimizer")
    assert "gradreg_strength: 0.25" in text
