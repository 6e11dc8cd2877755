"""Parameter groups: their own settings, groups that come later, names and exclusion."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import assert_same, closure_of, regression, unchecked, weights
from torch import nn

from gradreg_optim.wrapping.exclusion import matching
from gradreg_optim.wrapping.groups import KEYS


def parameter(*shape):
    return nn.Parameter(torch.randn(*shape, dtype=torch.float64))


def keys(group):
    return {name: group[f"gradreg_{name}"] for name in ("strength", "eps", "radius")}


def test_groups_bring_their_own_settings():
    """What a group brings counts for it, also against the constructor; eps and radius displace each other."""
    groups = [
        {"params": [parameter(1)]},
        {"params": [parameter(1)], "gradreg_strength": 0.5},
        {"params": [parameter(1)], "gradreg_radius": 0.25},
        {"params": [parameter(1)], "gradreg_eps": 0.125},
    ]
    with_eps = unchecked(torch.optim.SGD([dict(group) for group in groups], lr=0.1), strength=1.0, eps=2.0)
    assert [keys(group) for group in with_eps.param_groups] == [
        {"strength": 1.0, "eps": 2.0, "radius": None},
        {"strength": 0.5, "eps": 2.0, "radius": None},
        {"strength": 1.0, "eps": None, "radius": 0.25},
        {"strength": 1.0, "eps": 0.125, "radius": None},
    ]
    with_radius = unchecked(torch.optim.SGD([dict(group) for group in groups], lr=0.1), strength=1.0, radius=2.0)
    assert [(group["gradreg_eps"], group["gradreg_radius"]) for group in with_radius.param_groups] == [
        (None, 2.0),
        (None, 2.0),
        (None, 0.25),
        (0.125, None),
    ]


def test_a_group_of_strength_zero_is_neither_perturbed_nor_regularized():
    """Its parameters stay at θ, get g1, and count in no norm."""
    w, v = parameter(3), parameter(3)
    standing = []
    optimizer = unchecked(
        torch.optim.SGD([{"params": [w]}, {"params": [v], "gradreg_strength": 0.0}], lr=0.1),
        strength=0.1,
        eps=0.1,
        g1_clip=None,
        g2_clip=None,
    )
    start = v.detach().clone()
    closure = closure_of(optimizer, lambda: (standing.append(v.detach().clone()), (w * v).square().sum())[1])
    optimizer.step(closure)
    assert_same(standing, [start, start])
    assert_same(v.grad, closure.gradients[0][1])
    assert_same(w.grad, closure.gradients[1][0])  # γ = ε
    # Root of a root.
    assert optimizer.metrics["g1_norm"] == pytest.approx(closure.gradients[0][0].norm().item(), rel=1e-14)


def test_a_radius_is_a_length_over_all_groups():
    """ε = ρ/‖d‖ with the norm over everything regularized, so two groups with one radius move ρ together."""
    w, v = parameter(3), parameter(2, 2)
    standing = []
    optimizer = unchecked(torch.optim.SGD([{"params": [w]}, {"params": [v]}], lr=0.0), radius=0.5)
    closure = closure_of(optimizer, lambda: (standing.append(weights(optimizer)), w.square().sum() + v.pow(4).sum())[1])
    optimizer.step(closure)
    moved = torch.cat([(b - a).flatten() for a, b in zip(*standing, strict=True)])
    torch.testing.assert_close(moved.norm().item(), 0.5, rtol=1e-14, atol=0)  # θ' is rounded


@pytest.mark.parametrize("through", ["wrapper", "inner"])
def test_groups_added_later(through):
    """A group that comes later, through either optimizer, inherits the settings or brings its own, and is regularized."""
    w, v, u = parameter(3), parameter(3), parameter(3)
    inner = torch.optim.SGD([w], lr=0.1)
    optimizer = unchecked(inner, strength=0.2, eps=0.2, g1_clip=None, g2_clip=None)
    optimizer.step(closure_of(optimizer, lambda: w.pow(4).sum()))
    target = optimizer if through == "wrapper" else inner
    target.add_param_group({"params": [v], "lr": 0.01})
    target.add_param_group({"params": [u], "gradreg_radius": 0.5, "gradreg_strength": 0.0})
    closure = closure_of(optimizer, lambda: w.pow(4).sum() + v.pow(4).sum() + u.pow(4).sum())
    optimizer.step(closure)
    assert_same(v.grad, closure.gradients[1][1])  # γ = ε
    assert_same(u.grad, closure.gradients[0][2])
    assert inner.param_groups is optimizer.param_groups
    assert keys(inner.param_groups[1]) == {"strength": 0.2, "eps": 0.2, "radius": None}
    assert keys(inner.param_groups[2]) == {"strength": 0.0, "eps": None, "radius": 0.5}
    assert [group["gradreg_step"] for group in inner.param_groups] == [2, 2, 2]
    assert all(set(KEYS) <= set(group) for group in inner.param_groups)


def test_later_groups_are_excluded_by_name_too():
    """The patterns go on to hold: a group added later loses what they match, and need not match itself."""
    model, loss = regression()
    names = dict(model.named_parameters())
    inner = torch.optim.SGD([("2.bias", names.pop("2.bias"))], lr=0.1)
    optimizer = unchecked(inner, strength=0.1, eps=0.1, exclude="bias")
    optimizer.add_param_group({"params": list(names.items())})
    assert [group["gradreg_excluded"] for group in optimizer.param_groups] == [[0], [1]]
    closure = closure_of(optimizer, loss)
    optimizer.step(closure)
    assert_same(model[0].bias.grad, closure.gradients[0][2])
    assert_same(model[0].weight.grad, closure.gradients[1][1])


def test_settings_can_be_written_between_steps():
    """param_groups are the settings: what a scheduler writes there counts in the next step."""
    model, loss = regression()
    optimizer = unchecked(torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer.param_groups[0]["gradreg_strength"] = optimizer.param_groups[0]["gradreg_eps"] = 0.3
    closure = closure_of(optimizer, loss)
    optimizer.step(closure)
    assert_same([p.grad for p in model.parameters()], closure.gradients[1])
    optimizer.param_groups[0]["gradreg_strength"] = 0.0
    closure = closure_of(optimizer, loss)
    optimizer.step(closure)
    assert closure.calls == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("strength", float("nan")), ("eps", 0), ("g1_clip", -1), ("warmup_steps", 0.5), ("schedule", "up")],
)
def test_settings_written_between_steps_are_checked(name, value):
    """A value that the constructor would refuse is refused by the step, before any pass."""
    model, loss = regression()
    optimizer = unchecked(torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer.param_groups[0][f"gradreg_{name}"] = value
    closure = closure_of(optimizer, loss)
    with pytest.raises(ValueError, match=name):
        optimizer.step(closure)
    assert closure.calls == 0


def test_settings_that_groups_bring_are_checked():
    """What the constructor accepts, the step accepts: a group's own settings are checked at once, shared ones too."""
    for key, value in (("gradreg_strength", -1.0), ("gradreg_g1_clip", float("nan"))):
        with pytest.raises(ValueError, match=key.removeprefix("gradreg_")):
            unchecked(torch.optim.SGD([{"params": [parameter(1)], key: value}], lr=0.1))


def test_names_from_the_model_or_from_the_optimizer():
    """Both sources exclude the same parameters."""
    for known in (True, False):
        model, _ = regression()
        parameters = model.parameters() if known else model.named_parameters()
        optimizer = unchecked(torch.optim.SGD(parameters, lr=0.1), exclude="0.", model=model if known else None)
        assert optimizer.param_groups[0]["gradreg_excluded"] == [0, 1]


def test_a_tied_parameter_goes_by_all_its_names():
    """An output layer that shares the embedding's weight is excluded by either name."""
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "lm_head": nn.Linear(3, 5, bias=False)})
    model["lm_head"].weight = model["embed"].weight
    for pattern in ("embed", "lm_head"):
        assert matching([{"params": list(model.parameters())}], (pattern,), model) == {id(model["embed"].weight)}


@given(
    st.lists(
        st.tuples(st.sampled_from(["embed.w", "layer.w", "layer.bias", "head.bias"]), st.integers(0, 2)),
        min_size=1,
    )
)
def test_exactly_the_matching_names_are_left_out(entries):
    """In any distribution of names over groups exactly those that match are excluded."""
    groups = [{"params": [], "param_names": []} for _ in range(3)]
    for name, index in entries:
        groups[index]["params"].append(parameter(1))
        groups[index]["param_names"].append(name)
    patterns = ("embed", "bias")
    named = [pair for group in groups for pair in zip(group["param_names"], group["params"], strict=True)]
    expected = {id(own) for name, own in named if "embed" in name or "bias" in name}
    assert matching(groups, patterns, None, must_match=False) == expected


def test_leaving_out_parameters_by_hand():
    """``leave_out`` adds to what is excluded already."""
    model, _ = regression()
    optimizer = unchecked(torch.optim.SGD(model.named_parameters(), lr=0.1), exclude="2.bias")
    optimizer.leave_out([model[0].weight])
    assert optimizer.param_groups[0]["gradreg_excluded"] == [0, 3]


def test_wrapping_again_takes_the_new_settings():
    """A bare optimizer that was wrapped before keeps the step count and none of the old wrapper's settings."""
    model, loss = regression()
    inner = torch.optim.SGD(model.named_parameters(), lr=0.1)
    first = unchecked(inner, strength=0.5, radius=0.1, g1_clip=1.0, warmup_steps=3, exclude="bias")
    first.step(closure_of(first, loss))
    second = unchecked(inner, strength=0.25, eps=0.5, g1_clip=None)
    group = second.param_groups[0]
    assert keys(group) == {"strength": 0.25, "eps": 0.5, "radius": None}
    assert group["gradreg_g1_clip"] is None
    assert group["gradreg_warmup_steps"] == 0
    assert group["gradreg_excluded"] == []
    assert second.step_count == 1
