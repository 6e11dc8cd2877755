"""Settings as people write them: numbers of other libraries, names that are nearly right, things of the wrong kind."""

import copy
import inspect
import io
import re
import typing
import warnings

import numpy
import pytest
import torch
from problems import assert_same, closure_of, regression, twin_of, weights
from torch import nn

from gradreg_optim import GradRegConfig, GradRegOptimizer
from gradreg_optim.core.witnesses import MANY
from gradreg_optim.wrapping.settings import SETTINGS, Settings


def sgd(**group):
    return torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))], **group}], lr=0.1)


NUMBERS = {
    "NumPy": (numpy.float32, numpy.int64, numpy.bool_),
    "NumPy float64": (numpy.float64, numpy.int32, numpy.bool_),
    "0-d arrays": (numpy.array, numpy.array, numpy.array),
    "tensors": (torch.tensor, torch.tensor, torch.tensor),
}


@pytest.mark.parametrize("kinds", NUMBERS.values(), ids=NUMBERS)
def test_numbers_of_other_libraries(kinds):
    """They count as the numbers that they hold, in arguments, groups and flags; groups and checkpoints hold plain ones."""
    number, whole, switch = kinds
    model, loss = regression()
    others = [twin_of(model, loss) for _ in range(3)]
    given = {
        "strength": 0.25,
        "eps": 0.125,
        "g1_clip": 2.0,
        "warmup_steps": 0,
        "every": 1,
        "check_every": 0,
        "shrink": False,
    }
    foreign = {
        name: (switch if isinstance(value, bool) else whole if isinstance(value, int) else number)(value)
        for name, value in given.items()
    }
    expected = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), **given)
    flags = GradRegConfig(**{f"grad_reg_{name.removesuffix('_steps')}": value for name, value in foreign.items()})
    by_group = [
        {
            "params": list(others[2][0].parameters()),
            "gradreg_strength": number(0.25),
            "gradreg_eps": number(0.125),
        }
    ]
    optimizers = [
        GradRegOptimizer(torch.optim.SGD(others[0][0].parameters(), lr=0.1), **foreign),
        GradRegOptimizer(torch.optim.SGD(others[1][0].parameters(), lr=0.1), **{**flags.kwargs(), "exclude": ()}),
        GradRegOptimizer(torch.optim.SGD(by_group, lr=0.1), g1_clip=2.0, check_every=0, shrink=False),
    ]
    for current, its_loss in (
        (expected, loss),
        *((o, pair[1]) for o, pair in zip(optimizers, others, strict=True)),
    ):
        current.step(closure_of(current, its_loss))
        current.param_groups[0]["gradreg_strength"] = 0.5 if current is expected else number(0.5)
        current.step(closure_of(current, its_loss))
    for optimizer, (other, _) in zip(optimizers, others, strict=True):
        assert_same(weights(other), weights(model))
        values = [value for key, value in optimizer.param_groups[0].items() if key.startswith("gradreg_")]
        assert {type(value) for value in values} <= {int, float, bool, str, list, type(None)}
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("value", [torch.tensor([0.1]), numpy.array([0.1, 0.2]), torch.tensor(True), torch.tensor(-1.0), 1j])
def test_what_is_no_number_is_refused(value):
    """More than one element, a truth value or a number outside the range: the rule of the setting."""
    with pytest.raises(ValueError, match="strength must be 'auto' or a finite number >= 0"):
        GradRegOptimizer(sgd(), strength=value)
    with pytest.raises(ValueError, match="radius must be None, 'auto' or a finite number > 0"):
        GradRegOptimizer(sgd(), radius=value)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("gradreg_strenght", "gradreg_strength"),
        ("grad_reg_strength", "gradreg_strength"),
        ("gradreg_warmup", "gradreg_warmup_steps"),
        ("gradreg_zzz", "Names are gradreg_check_every"),
    ],
)
@pytest.mark.parametrize("when", ["constructor", "add_param_group", "between steps"])
def test_keys_that_mean_nothing_are_refused(key, meant, when):
    """Wherever a group gets one: the message names the key that was meant, and no group is left half adopted."""
    model, loss = regression()
    inner = torch.optim.SGD(
        [{"params": list(model[0].parameters()), **({key: 0.5} if when == "constructor" else {})}], lr=0.1
    )
    before = copy.copy(inner.param_groups[0])

    def write():
        optimizer = GradRegOptimizer(inner)
        if when == "add_param_group":
            optimizer.add_param_group({"params": list(model[2].parameters()), key: 0.5})
        else:
            optimizer.param_groups[0][key] = 0.5
            optimizer.step(closure_of(optimizer, loss))

    with pytest.raises(ValueError, match=f"'{key}' in a parameter group.*{meant}"):
        write()
    assert len(inner.param_groups) == 1
    if when == "constructor":
        assert inner.param_groups[0] == before


def test_what_is_no_group_is_torchs_error():
    """``add_param_group`` of a list says what it says without the wrapper."""
    with pytest.raises(TypeError, match="param_group must be a dict"):
        GradRegOptimizer(sgd()).add_param_group([nn.Parameter(torch.ones(1))])


def test_groups_cannot_differ_in_what_is_read_from_the_first():
    """A setting of the whole optimizer in one group alone would have no effect; the same value may stand in each."""
    parameters = [nn.Parameter(torch.ones(1)) for _ in range(3)]
    groups = [{"params": [parameters[0]]}, {"params": [parameters[1]], "gradreg_method": "central"}]
    same = [{**group, "gradreg_method": "central"} for group in groups]
    optimizer = GradRegOptimizer(torch.optim.SGD(same, lr=0.1))
    with pytest.raises(ValueError, match="gradreg_method='forward' in one parameter group and 'central' in the first"):
        optimizer.add_param_group({"params": [parameters[2]], "gradreg_method": "forward"})
    assert len(optimizer.param_groups) == 2
    with pytest.raises(ValueError, match="gradreg_method='central' in one parameter group and 'forward' in the first"):
        GradRegOptimizer(torch.optim.SGD([{"params": [parameters[0]], "gradreg_method": "forward"}, groups[1]], lr=0.1))
    with pytest.raises(ValueError, match="gradreg_method='central' in one parameter group"):
        GradRegOptimizer(torch.optim.SGD(groups, lr=0.1))


@pytest.mark.parametrize("name", [*(setting.name for setting in SETTINGS if setting.is_key), "model", "scaler"])
def test_settings_are_no_attributes(name):
    """Assigning one would have no effect: the message says where it is changed."""
    optimizer = GradRegOptimizer(sgd())
    where = "constructor" if name in ("model", "scaler") else f"gradreg_{name}"
    with pytest.raises(AttributeError, match=f"optimizer.{name} = … would have no effect.*{where}"):
        setattr(optimizer, name, 0.5)
    optimizer.my_note = 0.5  # what is no setting is nobody's business


CHOICES = {"method", "norm_of", "rounding", "schedule", "resample"}


def test_choices_are_typed():
    """Signature, type of the keyword arguments and flags offer exactly the values that the rules accept."""
    hints = typing.get_type_hints(GradRegOptimizer.__init__)
    for setting in SETTINGS:
        if setting.rule.choices is None:
            continue
        assert set(literals(hints[setting.name])) == set(setting.rule.choices), setting.name
        assert set(literals(setting.rule.kind)) == set(setting.rule.choices), setting.name
    assert {setting.name for setting in SETTINGS if setting.rule.choices} == CHOICES


def literals(hint):
    if typing.get_origin(hint) is typing.Literal:
        return typing.get_args(hint)
    return [value for part in typing.get_args(hint) for value in literals(part)]


def test_the_types_of_attach_are_those_of_the_constructor():
    """The TypedDict names every keyword argument of the constructor, with its type."""
    parameters = inspect.signature(GradRegOptimizer).parameters
    keywords = [name for name, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY]
    hints = typing.get_type_hints(GradRegOptimizer.__init__)
    assert typing.get_type_hints(Settings) == {name: hints[name] for name in keywords}


@pytest.mark.parametrize("exclude", [3, True, 0.5, b"embed", ["embed", 3], nn.Linear(2, 2), torch.ones(2)], ids=type)
def test_patterns_of_the_wrong_kind(exclude):
    """Whatever is no pattern is refused by the rule of patterns, in the constructor and in the flags."""
    for construct in (
        lambda: GradRegOptimizer(sgd(), exclude=exclude),
        lambda: GradRegConfig(grad_reg_exclude=exclude),
    ):
        with pytest.raises(ValueError, match="every pattern must be a non-empty string"):
            construct()


@pytest.mark.parametrize("scaler", [True, 1024.0, "cuda", torch.amp.GradScaler])
def test_a_scaler_of_the_wrong_kind(scaler):
    """Only what scales losses is taken for a scaler; the class itself does not."""
    if isinstance(scaler, type):
        scaler = {"class": scaler}
    with pytest.raises(TypeError, match=r"scaler=.* is a .*losses are scaled by a torch\.amp"):
        GradRegOptimizer(sgd(), scaler=scaler)


@pytest.mark.parametrize("of", [lambda m: m.state_dict(), lambda m: list(m.parameters()), type, lambda m: m.forward])
def test_a_model_of_the_wrong_kind(of):
    """A state dict, parameters, a class or a function are no module."""
    model, _ = regression()
    with pytest.raises(TypeError, match=r"model=.* is a .*Pass the module"):
        GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model=of(model))


@pytest.mark.parametrize(
    "construct",
    [
        lambda model: GradRegOptimizer(model),
        lambda model: GradRegOptimizer(sgd(), strength=model),
        lambda model: GradRegOptimizer(sgd(), exclude=model),
        lambda model: GradRegOptimizer(sgd(), exclude=[model]),
        lambda model: GradRegOptimizer(sgd(), scaler=model),
        lambda model: GradRegOptimizer(sgd(), model=model.state_dict()),
        lambda model: GradRegOptimizer(sgd(), eps=0.1, radius=model.state_dict()),
    ],
)
def test_messages_do_not_print_models(construct):
    """A message fits on a few lines, whatever was passed."""
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(50)])
    with pytest.raises((TypeError, ValueError)) as caught:
        construct(model)
    assert len(str(caught.value)) < 300
    assert "Linear(" not in str(caught.value)


YAML = """
grad_reg_strength: 1e-2
grad_reg_eps: 1e-3
grad_reg_warmup: 5
grad_reg_radius: null
grad_reg_exclude: lm_head
"""


def test_yaml():
    """What PyYAML makes of a file: ``1e-2`` is text to it, and one pattern is no list."""
    read = pytest.importorskip("yaml", reason="Transformers needs it, this package does not").safe_load(YAML)
    assert isinstance(read["grad_reg_strength"], str)
    kwargs = GradRegConfig(**read).kwargs()
    assert kwargs["strength"] == 0.01
    assert kwargs["eps"] == 0.001
    assert kwargs["warmup_steps"] == 5
    assert kwargs["exclude"] == ("lm_head",)
    for text in ("0.1x", "", "true"):
        with pytest.raises(ValueError, match="strength must be 'auto' or a finite number >= 0"):
            GradRegConfig(grad_reg_strength=text)
    with pytest.raises(ValueError, match="warmup_steps must be an integer"):
        GradRegConfig(grad_reg_warmup="1.5")


def ratios(steps, strength, **settings):
    """The warnings of some steps on ½x⁴, whose penalty is 6·strength·x² times its gradient."""
    weight = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = GradRegOptimizer(torch.optim.SGD([weight], lr=0.0), strength=strength, check_every=0, **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            optimizer.step(closure_of(optimizer, lambda: 0.5 * weight.pow(4).sum()))
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    ("strength", "words"),
    [
        (5.0, r"over 20 steps the penalty was 30.1 times as long as the gradient.*multiply strength by 0.02"),
        (1e-3, "it changes next to nothing.*raise strength"),
    ],
)
def test_a_penalty_that_swamps_the_gradient_or_vanishes_is_named_once(strength, words):
    """By the mean of many steps: one warning, with the figure and the remedy; not before, and not between."""
    assert ratios(MANY - 1, strength) == []
    (message,) = ratios(5 * MANY, strength)
    assert re.search(words, message)
    assert ratios(5 * MANY, 1.0) == []  # 6
    assert ratios(5 * MANY, 5.0, max_penalty_ratio=2.0) == []
