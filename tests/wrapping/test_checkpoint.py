"""State dicts, pickles and copies."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from problems import assert_same, closure_of, every_optimizer, regression, twin_of, unchecked, weights
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from gradreg_optim import GradRegOptimizer
from gradreg_optim.wrapping.groups import SETTING_KEYS

SETTINGS = {"strength": 0.1, "eps": 0.05, "warmup_steps": 2, "schedule": "linear", "schedule_steps": 6}


def through_a_file(state):
    """What a checkpoint on disk brings back, read without permission to run code."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def take_steps(optimizer, loss, count):
    for _ in range(count):
        optimizer.step(closure_of(optimizer, loss))


@pytest.mark.parametrize("optimizer_class", **every_optimizer)
def test_resuming_is_bitwise(optimizer_class):
    """Three steps, a checkpoint on disk, three steps: the same bits as six, across the end of the warm-up and a rise."""
    # Torch loads all of ASGD's state in the dtype of the weights.
    model, loss = regression(dtype=torch.float32)
    if optimizer_class.__name__ == "Muon":
        model[0].bias, model[2].bias = None, None  # Muon takes matrices only
    optimizer = unchecked(optimizer_class(model.parameters(), lr=0.01), **SETTINGS)
    take_steps(optimizer, loss, 3)
    resumed, resumed_loss = twin_of(model, loss)
    other = unchecked(optimizer_class(resumed.parameters(), lr=0.5))
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert other.step_count == 3
    take_steps(optimizer, loss, 3)
    take_steps(other, resumed_loss, 3)
    assert_same(weights(resumed), weights(model))
    assert_same(other.state_dict()["state"], optimizer.state_dict()["state"])


@pytest.mark.parametrize("settings", [{}, {"radius": 0.02}, SETTINGS], ids=["defaults", "radius", "own"])
def test_every_setting_is_saved_and_loaded(settings):
    """The groups' settings come back from disk as plain values, whatever the new wrapper was constructed with."""
    model, loss = regression()
    optimizer = unchecked(torch.optim.SGD(model.parameters(), lr=0.1), **settings)
    take_steps(optimizer, loss, 1)
    other = unchecked(torch.optim.SGD(model.parameters(), lr=0.1), strength=0.7, eps=0.3, g1_clip=None)
    with pytest.warns(UserWarning, match="replaces strength=0.7 by"):
        other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert other.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


RESUMED = [
    ({"strength": 0.7}, {"strength": 0.1}, "strength=0.1 by 0.7"),
    ({}, {"strength": 0.5}, "strength=0.5 by 0.1"),
    ({"radius": 0.1}, {"strength": 0.1, "eps": 0.2}, "eps=0.2 by None"),
    ({}, {"method": "central", "strength": 0.1, "every": 2}, "method='central' by 'forward', every=2 by 1"),
    ({}, {}, ""),
    ({"eps": 0.5, "g1_clip": 1.0}, {}, ""),
    ({}, {"strength": 0.1, "g2_clip": 10.0}, ""),
    ({"warmup_steps": 3}, {"strength": 0.1, "warmup_steps": 3}, ""),
]


@pytest.mark.parametrize(("saved", "given", "replaced"), RESUMED, ids=str)
def test_settings_that_a_checkpoint_replaces_are_named(saved, given, replaced):
    """What was given by hand and is not in the checkpoint is named with both values; what was left at its default is not."""
    model, loss = regression()
    optimizer = unchecked(torch.optim.SGD(model.parameters(), lr=0.1), **{"strength": 0.1, **saved})
    other = unchecked(torch.optim.SGD(model.parameters(), lr=0.1), **given)
    state = through_a_file(optimizer.state_dict())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if not replaced:
            copy.deepcopy(other).load_state_dict(state)  # which knows as well what was left at its default
        other.load_state_dict(state)
        other.load_state_dict(other.state_dict())  # what Accelerate does with every optimizer says nothing
    messages = [str(warning.message) for warning in caught]
    assert messages == ([] if not replaced else [message for message in messages if f"replaces {replaced}: " in message])
    assert len(messages) == bool(replaced)
    closure = closure_of(other, loss)
    other.step(closure)
    assert other.param_groups[0]["gradreg_strength"] == saved.get("strength", 0.1)


def test_a_group_whose_own_strength_is_replaced_is_named():
    """Groups are compared one by one, and each pair of values is named once."""
    model, _ = regression()

    def wrapped(strength, own):
        groups = [{"params": [p], **({"gradreg_strength": own} if p.ndim == 1 else {})} for p in model.parameters()]
        return unchecked(torch.optim.SGD(groups, lr=0.1), strength=strength)

    with pytest.warns(UserWarning, match=r"replaces strength=0\.5 by 0\.1, strength=0\.25 by 0\.0: ") as caught:
        wrapped(0.5, 0.25).load_state_dict(wrapped(0.1, 0.0).state_dict())
    assert len(caught) == 1


def test_the_state_holds_nothing_but_the_base_optimizers():
    """No scratch of the second pass in ``state``: its keys, sizes and types are those of the bare optimizer."""
    model, loss = regression()
    other, other_loss = twin_of(model, loss)
    optimizer = unchecked(torch.optim.AdamW(model.parameters()))
    bare = torch.optim.AdamW(other.parameters())
    take_steps(optimizer, loss, 2)
    for _ in range(2):
        bare.step(closure_of(bare, other_loss))
    assert set(vars(optimizer)) == set(vars(unchecked(torch.optim.AdamW(model.parameters()))))
    for state, expected in zip(optimizer.state.values(), bare.state.values(), strict=True):
        assert {key: (value.shape, value.dtype) for key, value in state.items()} == {
            key: (value.shape, value.dtype) for key, value in expected.items()
        }


def test_into_the_bare_optimizer_and_back():
    """A checkpoint loads into the bare base optimizer and, saved from there, into the wrapper again, in silence."""
    model, loss = regression()
    optimizer = unchecked(torch.optim.AdamW(model.parameters(), lr=0.05), strength=0.3)
    take_steps(optimizer, loss, 2)
    bare = torch.optim.AdamW(model.parameters())
    bare.load_state_dict(through_a_file(optimizer.state_dict()))
    assert bare.param_groups[0]["lr"] == 0.05
    assert_same(bare.state_dict()["state"], optimizer.state_dict()["state"])
    bare.step(closure_of(bare, loss))
    back = unchecked(torch.optim.AdamW(model.parameters()))
    back.load_state_dict(through_a_file(bare.state_dict()))
    assert back.param_groups[0]["gradreg_strength"] == 0.3
    assert back.step_count == 2
    assert_same(back.state_dict()["state"], bare.state_dict()["state"])


def test_from_the_bare_optimizer():
    """A checkpoint of the bare optimizer loads with a warning; settings, a group's own ones too, stay, steps count anew."""
    model, loss = regression()
    groups = [
        {"params": [model[0].weight]},
        {"params": [model[2].weight], "gradreg_strength": 0.5, "gradreg_radius": 0.1},
    ]
    bare = torch.optim.AdamW([{"params": group["params"]} for group in groups], lr=0.05)
    bare.step(closure_of(bare, loss))
    optimizer = unchecked(torch.optim.AdamW(groups), **SETTINGS)
    before = copy.deepcopy(optimizer.state_dict()["param_groups"])
    take_steps(optimizer, loss, 3)
    with pytest.warns(UserWarning, match="gradreg_strength.*saved without GradRegOptimizer.*step 0"):
        optimizer.load_state_dict(through_a_file(bare.state_dict()))
    assert optimizer.step_count == 0
    assert [group.pop("lr") for group in optimizer.state_dict()["param_groups"]] == [0.05, 0.05]
    for group, expected in zip(optimizer.param_groups, before, strict=True):
        assert {k: v for k, v in group.items() if k in SETTING_KEYS} == {
            k: v for k, v in expected.items() if k in SETTING_KEYS
        }
    assert_same(optimizer.state_dict()["state"], bare.state_dict()["state"])


def test_keys_of_settings_that_are_gone_are_dropped():
    """A checkpoint whose groups carry keys of settings that the package no longer has loads in silence, and trains."""
    model, loss = regression()
    optimizer = unchecked(torch.optim.AdamW(model.parameters(), lr=0.05), strength=0.3)
    take_steps(optimizer, loss, 2)
    state = optimizer.state_dict()
    gone = {"gradreg_memory": "full", "gradreg_between": "reuse", "gradreg_along": 0.5}
    for group in state["param_groups"]:
        group.update(gone)
    other = unchecked(torch.optim.AdamW(model.parameters()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(through_a_file(state))
    assert not any(gone.keys() & group.keys() for group in other.param_groups)
    before = weights(model)
    take_steps(other, loss, 1)
    assert other.step_count == 3
    assert other.metrics["penalty_ratio"] > 0
    assert all(not torch.equal(old, new) for old, new in zip(before, weights(model), strict=True))


def test_groups_that_came_through_the_inner_optimizer_are_saved_and_loaded():
    """A group that no step has seen yet goes into checkpoints with its settings, and out of them."""
    model, _ = regression()
    wrappers = []
    for strength in (0.5, 0.1):
        inner = torch.optim.SGD(model[0].parameters(), lr=0.1)
        wrappers.append(unchecked(inner, strength=strength))
        inner.add_param_group({"params": list(model[2].parameters())})
    with pytest.warns(UserWarning, match="replaces strength=0.1 by 0.5"):
        wrappers[1].load_state_dict(through_a_file(wrappers[0].state_dict()))
    assert [group["gradreg_strength"] for group in wrappers[1].param_groups] == [0.5, 0.5]


def test_exclusion_is_about_this_model_and_is_not_loaded():
    """Positions are those of the names in the model at hand, not those of the saved run."""
    model, _ = regression()
    saved = unchecked(torch.optim.SGD(model.named_parameters(), lr=0.1), exclude="0.")
    current = unchecked(torch.optim.SGD(model.named_parameters(), lr=0.1), exclude="2.")
    current.load_state_dict(saved.state_dict())
    assert current.param_groups[0]["gradreg_excluded"] == [2, 3]


def test_a_callable_schedule_is_not_saved_and_stays():
    """Like LambdaLR's, a callable is not part of the checkpoint; the one given to the constructor goes on."""
    model, loss = regression()
    optimizer = unchecked(torch.optim.SGD(model.parameters(), lr=0.1), strength=1.0, schedule=lambda step: 1 / (1 + step))
    take_steps(optimizer, loss, 3)
    other = unchecked(torch.optim.SGD(model.parameters(), lr=0.1), schedule=lambda step: 1 / (1 + step))
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    take_steps(other, loss, 1)
    assert other.metrics["strength"] == 0.25


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("scheduled", [False, True], ids=["plain", "under a scheduler"])
def test_copies_go_their_own_way(duplicate, scheduled):
    """A copy of model and optimizer takes the same steps on its own weights, and leaves those of the original alone."""
    model, loss = regression()
    optimizer = unchecked(
        torch.optim.AdamW(model.named_parameters(), lr=0.05),
        exclude="2.bias",
        model=model,
        **{**SETTINGS, "warmup_steps": 0},
    )
    if scheduled:  # which puts a step method of its own on the instance
        torch.optim.lr_scheduler.StepLR(optimizer, 10)
    take_steps(optimizer, loss, 2)
    other, other_optimizer = duplicate((model, optimizer))
    before = weights(model)
    assert type(other_optimizer) is GradRegOptimizer
    take_steps(other_optimizer, lambda: loss(other), 2)
    assert_same(weights(model), before)
    take_steps(optimizer, loss, 2)
    assert_same(weights(other), weights(model))
    assert_same(other_optimizer.state_dict()["state"], optimizer.state_dict()["state"])
    assert other_optimizer.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


def test_a_pickle_does_not_carry_the_model():
    """The optimizer's pickle holds parameters and state, not modules with their buffers."""
    model, loss = regression(nn.BatchNorm1d(6))
    optimizer = unchecked(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    take_steps(optimizer, loss, 1)
    assert b"BatchNorm" not in pickle.dumps(optimizer)


@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.SGD])
def test_distributed_checkpoint(base):
    """get/set_optimizer_state_dict of torch.distributed.checkpoint resume bit for bit, by parameter name."""
    model, loss = regression()
    optimizer = unchecked(base(model.parameters(), lr=0.05), **SETTINGS)
    take_steps(optimizer, loss, 3)
    optimizer.zero_grad()
    state = get_optimizer_state_dict(model, optimizer)
    assert "0.weight" in state["param_groups"][0]["params"]
    resumed, resumed_loss = twin_of(model, loss)
    before = weights(resumed)
    other = unchecked(base(resumed.parameters(), lr=0.5))
    set_optimizer_state_dict(resumed, other, through_a_file(state))
    assert_same(weights(resumed), before)
    assert other.step_count == 3
    take_steps(optimizer, loss, 2)
    take_steps(other, resumed_loss, 2)
    assert_same(weights(resumed), weights(model))


def test_only_state_initialization_may_step_without_a_closure():
    """torch.distributed.checkpoint steps on zero gradients at rates of 0 to create state; any other bare step() raises."""
    model, loss = regression()
    optimizer = unchecked(torch.optim.AdamW(model.parameters(), lr=0.05))
    before = weights(model)
    with pytest.raises(RuntimeError, match="closure"):
        optimizer.step()
    optimizer.zero_grad()
    loss().backward()
    optimizer.param_groups[0]["lr"] = 0.0  # a warm-up's first rate is no excuse: the gradients are not zero
    with pytest.raises(RuntimeError, match="closure"):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.param_groups[0]["lr"] = 0.05
    get_optimizer_state_dict(model, optimizer)
    assert len(optimizer.state) == 4
    assert optimizer.step_count == 0
    optimizer.param_groups[0]["lr"] = 0.0
    with pytest.raises(RuntimeError, match="closure"):  # the state is there by now
        optimizer.step()
    assert_same(weights(model), before)


def test_hooks_of_state_dicts_run_on_wrapper_and_base():
    """All four kinds of state-dict hooks are called, and may replace what they are given."""
    model, loss = regression()
    optimizer = unchecked(torch.optim.AdamW(model.parameters()))
    take_steps(optimizer, loss, 1)
    called = []
    for target, name in ((optimizer, "wrapper"), (optimizer.optimizer, "base")):
        target.register_state_dict_pre_hook(lambda *_, name=name: called.append(f"{name} save"))
        target.register_state_dict_post_hook(lambda _, state, name=name: {**state, name: True})
        target.register_load_state_dict_pre_hook(lambda _, state, name=name: called.append((name, state.pop(name))))
        target.register_load_state_dict_post_hook(lambda *_, name=name: called.append(f"{name} loaded"))
    state = optimizer.state_dict()
    assert state["wrapper"]
    assert state["base"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(state)
    assert called == [
        "wrapper save",
        "base save",
        ("wrapper", True),
        ("base", True),
        "base loaded",
        "wrapper loaded",
    ]
