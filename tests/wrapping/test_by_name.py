"""GradReg, which builds the optimizer that it wraps: what it builds, and that it is one wrapper like the other."""

import copy
import io
import pickle

import pytest
import torch
from problems import closure_of, regression

from gradreg_optim import GradReg, GradRegOptimizer

SETTINGS = {"strength": 0.3, "eps": 0.01, "exclude": "bias"}
BASES = {
    "torch.optim.AdamW": {"lr": 0.1, "weight_decay": 0.1, "eps": 1e-6},
    "torch.optim.SGD": {"lr": 0.1, "momentum": 0.9},
    "torch.optim.Adafactor": {"lr": 0.1},
}


class Mine(torch.optim.SGD):
    """An optimizer of one's own, which is not the module's only name."""


def named(model):
    return list(model.named_parameters())


def groups(model):
    """Groups, one with a strength of its own."""
    first, *others = model.named_parameters()
    return [{"params": [first], "gradreg_strength": 0.1, "lr": 0.02}, {"params": others}]


def trained(make, parameters=named, steps=3):
    torch.manual_seed(3)
    model, loss = regression(dtype=torch.float32)
    optimizer = make(parameters(model))
    for _ in range(steps):
        optimizer.step(closure_of(optimizer, loss))
    return [parameter.detach() for parameter in model.parameters()], optimizer


def assert_equal(one, other):
    assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("parameters", [named, groups])
@pytest.mark.parametrize("base", BASES)
def test_it_is_wrapping_by_hand(base, parameters):
    """By name, by class and by hand: the same weights bit for bit, which are not those without the penalty."""
    cls, kwargs = getattr(torch.optim, base.rpartition(".")[2]), BASES[base]
    by_hand, _ = trained(lambda params: GradRegOptimizer(cls(params, **kwargs), **SETTINGS), parameters)
    for name in (base, cls):
        by_name, optimizer = trained(lambda params, name=name: GradReg(params, name, SETTINGS, **kwargs), parameters)
        assert_equal(by_hand, by_name)
        assert type(optimizer.optimizer) is cls
    plain, _ = trained(lambda params: GradRegOptimizer(cls(params, **kwargs), strength=0.0))
    assert not all(map(torch.equal, by_hand, plain))


def test_defaults():
    """Parameters alone make AdamW with the default penalty; a name inside a class of this file is found as well."""
    optimizer = GradReg(regression()[0].parameters(), lr=0.1)
    assert type(optimizer.optimizer) is torch.optim.AdamW
    assert (
        optimizer.param_groups[0]["gradreg_strength"]
        == GradRegOptimizer(optimizer.optimizer).param_groups[0]["gradreg_strength"]
    )
    assert isinstance(GradReg(regression()[0].parameters(), f"{__name__}.Mine", lr=0.1).optimizer, Mine)


def test_numbers_may_be_text():
    """YAML reads 1e-3 as text; a text that is no number is refused by its setting's rule."""
    group = GradReg(named(regression()[0]), gradreg={"strength": "1e-2", "warmup_steps": "3"}).param_groups[0]
    assert (group["gradreg_strength"], group["gradreg_warmup_steps"]) == (0.01, 3)
    with pytest.raises(ValueError, match="strength='much'"):
        GradReg(named(regression()[0]), gradreg={"strength": "much"})


@pytest.mark.parametrize("name", ["AdamW", "", "torch.optim", "no_such_package.AdamW", "math.pi", "torch.optim.AdamW.step"])
def test_what_is_no_optimizer_is_named(name):
    """Names that cannot be imported are ImportErrors, what is no class of optimizers a TypeError; both show the name."""
    with pytest.raises((ImportError, TypeError), match=f"base_optimizer='{name}'.*torch.optim.AdamW"):
        GradReg(named(regression()[0]), name)


def test_arguments_of_the_base_that_are_settings_too():
    """``eps`` beside ``gradreg`` is AdamW's; what AdamW does not take is sent to ``gradreg``."""
    optimizer = GradReg(named(regression()[0]), eps=1e-5, gradreg={"eps": 0.1})
    assert (optimizer.param_groups[0]["eps"], optimizer.param_groups[0]["gradreg_eps"]) == (1e-5, 0.1)
    with pytest.raises(TypeError, match=r"radius=0.1 is no argument of AdamW.*gradreg=\{'radius': 0.1\}"):
        GradReg(named(regression()[0]), radius=0.1)


def saved(optimizer):
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda o: pickle.loads(pickle.dumps(o)), "torch.save": saved}


@pytest.mark.parametrize("how", COPIES)
def test_copies_go_on_alike(how):
    """Model and optimizer copied together take the original's next step, bit for bit."""
    model, _ = regression(dtype=torch.float32)
    optimizer = GradReg(named(model), "torch.optim.AdamW", SETTINGS, lr=0.1)
    x, y = torch.randn(6, model[0].in_features), torch.randn(6, 1)

    def step(model, optimizer):
        optimizer.step(closure_of(optimizer, lambda: (model(x).sum(1, keepdim=True) - y).square().mean()))

    step(model, optimizer)
    model_2, optimizer_2 = COPIES[how]((model, optimizer))
    assert type(optimizer_2) is GradReg
    for pair in ((model, optimizer), (model_2, optimizer_2)):
        step(*pair)
    assert_equal(model.parameters(), model_2.parameters())
    assert optimizer_2.step_count == 2


def test_state_dicts_are_those_of_the_wrapper():
    """A checkpoint of GradReg loads into GradRegOptimizer and back, with settings, state and count."""
    _, by_name = trained(lambda params: GradReg(params, "torch.optim.AdamW", SETTINGS, lr=0.1))
    model, _ = regression(dtype=torch.float32)
    by_hand = GradRegOptimizer(torch.optim.AdamW(named(model), lr=0.1), **SETTINGS)
    by_hand.load_state_dict(by_name.state_dict())
    again = GradReg(named(model), "torch.optim.AdamW", SETTINGS, lr=0.1)
    again.load_state_dict(by_hand.state_dict())
    assert again.step_count == by_hand.step_count == 3
    assert str(again.state_dict()) == str(by_name.state_dict())
