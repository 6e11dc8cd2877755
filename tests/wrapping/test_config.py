"""Settings, their rules, and their command line."""

import dataclasses
import inspect
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradreg_optim import PUBLISHED, GradReg, GradRegConfig, GradRegOptimizer
from gradreg_optim.wrapping.settings import check_settings, exclude_patterns

POSITIVE = st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False)
NOT_POSITIVE = st.one_of(
    st.floats(max_value=0),
    st.sampled_from([math.nan, math.inf, -math.inf]),
    st.just("1"),
    st.just(True),
    st.just([1.0]),
)
FIELDS = {
    "strength": "grad_reg_strength",
    "eps": "grad_reg_eps",
    "radius": "grad_reg_radius",
    "warmup_steps": "grad_reg_warmup",
    "schedule": "grad_reg_schedule",
    "schedule_steps": "grad_reg_schedule_steps",
    "g1_clip": "grad_reg_g1_clip",
    "g2_clip": "grad_reg_g2_clip",
    "max_penalty_ratio": "grad_reg_max_penalty_ratio",
    "exclude": "grad_reg_exclude",
    "method": "grad_reg_method",
    "rounding": "grad_reg_rounding",
    "check_every": "grad_reg_check_every",
    "shrink": "grad_reg_shrink",
    "every": "grad_reg_every",
    "norm_of": "grad_reg_norm_of",
    "resample": "grad_reg_resample",
}


def constructor():
    return {
        name: parameter
        for name, parameter in inspect.signature(GradRegOptimizer).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def test_every_setting_has_a_flag():
    """The dataclass covers the constructor, objects that no command line can name aside."""
    assert set(constructor()) - {"model", "scaler"} == set(FIELDS)
    names = {field.name for field in dataclasses.fields(GradRegConfig)}
    assert names == {*FIELDS.values(), "grad_reg_published"}
    assert all(field.metadata["help"] for field in dataclasses.fields(GradRegConfig))


def test_defaults_agree_with_the_constructor():
    """A configuration left alone means the same as no arguments at all."""
    kwargs = GradRegConfig().kwargs()
    defaults = {name: parameter.default for name, parameter in constructor().items() if name in FIELDS}
    assert kwargs.pop("schedule") == "constant"  # what None means
    assert defaults.pop("schedule") is None
    assert kwargs == defaults


@pytest.mark.parametrize(("name", "value"), [("strength", 0.5), ("eps", 0.25), ("radius", 0.02), ("g1_clip", 2.0)])
def test_flags_reach_the_constructor(name, value):
    """Each field arrives under the name of its keyword argument."""
    kwargs = GradRegConfig(**{FIELDS[name]: value}).kwargs()
    assert kwargs[name] == value
    GradRegOptimizer(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1), **{**kwargs, "exclude": ()})


@pytest.mark.parametrize("strength", ["auto", "0.3", 0.3])
def test_strength_is_a_word_or_a_number(strength):
    """As a command line or YAML has it."""
    expected = strength if strength == "auto" else 0.3
    assert GradRegConfig(grad_reg_strength=strength).kwargs()["strength"] == expected
    parser = pytest.importorskip("transformers.hf_argparser", reason="the parser is part of Transformers")
    (config,) = parser.HfArgumentParser(GradRegConfig).parse_args_into_dataclasses(["--grad_reg_strength", str(strength)])
    assert config.kwargs()["strength"] == expected


def test_published():
    """All settings of the published step, but for those that are given, as flags and by name."""
    rest = {name: value for name, value in GradRegConfig().kwargs().items() if name not in PUBLISHED}
    assert GradRegConfig(grad_reg_published=True).kwargs() == {**PUBLISHED, **rest}
    kwargs = GradRegConfig(grad_reg_published=True, grad_reg_strength=1e-3, grad_reg_radius="auto").kwargs()
    assert kwargs == {**PUBLISHED, **rest, "strength": 1e-3, "eps": None, "radius": "auto"}
    parser = pytest.importorskip("transformers.hf_argparser", reason="the parser is part of Transformers")
    (config,) = parser.HfArgumentParser(GradRegConfig).parse_args_into_dataclasses(["--grad_reg_published", "true"])
    assert config.kwargs() == {**PUBLISHED, **rest}
    by_name = GradReg([torch.zeros(1, requires_grad=True)], gradreg={"published": True, "strength": 0.1, "radius": "auto"})
    group = by_name.param_groups[0]
    assert (group["gradreg_strength"], group["gradreg_eps"], group["gradreg_radius"]) == (0.1, None, "auto")
    assert (by_name.norm_of, by_name.resample, group["gradreg_rounding"]) == ("step", "reuse", "nearest")
    plain = GradReg([torch.zeros(1, requires_grad=True)], gradreg={"published": False}).param_groups[0]
    assert plain["gradreg_strength"] == "auto"


def test_zero_switches_a_clip_off():
    """A command line cannot say None."""
    kwargs = GradRegConfig(grad_reg_g1_clip=0, grad_reg_g2_clip=0).kwargs()
    assert kwargs["g1_clip"] is None
    assert kwargs["g2_clip"] is None


@given(POSITIVE, POSITIVE, st.integers(0), st.one_of(st.none(), POSITIVE))
def test_valid_numbers_pass(strength, eps, warmup, clip):
    """Every number inside the documented range is accepted, by the dataclass and by the check."""
    GradRegConfig(grad_reg_strength=strength, grad_reg_eps=eps, grad_reg_warmup=warmup, grad_reg_max_penalty_ratio=clip)
    check_settings(strength=0, g1_clip=clip, g2_clip=math.inf)


@pytest.mark.parametrize("name", ["eps", "radius", "g1_clip", "g2_clip", "max_penalty_ratio"])
@given(NOT_POSITIVE)
def test_invalid_numbers_do_not(name, value):
    """Zero, negative numbers, NaN, and things that are no numbers are refused; a clip may be infinite."""
    if name.endswith(("clip", "ratio")) and value == math.inf:
        return
    with pytest.raises(ValueError, match=f"{name}="):
        check_settings(**{name: value})


@given(st.one_of(st.floats(max_value=0, exclude_max=True), st.sampled_from([math.nan, math.inf, "0.1", None, False])))
def test_strength_may_be_zero_and_nothing_below(value):
    """Strength has the one range that includes 0."""
    with pytest.raises(ValueError, match="strength="):
        check_settings(strength=value)


def test_eps_is_refused_beside_a_radius():
    """Both set the length of the same step."""
    check_settings(eps=None, radius=0.02)
    with pytest.raises(ValueError, match="not both"):
        check_settings(eps=1e-3, radius=0.02)


def test_patterns():
    """One string is one pattern, not its letters; None is none."""
    assert exclude_patterns("embed") == ("embed",)
    assert exclude_patterns(["a", "b"]) == ("a", "b")
    assert exclude_patterns(pattern for pattern in "ab") == ("a", "b")
    assert exclude_patterns(None) == ()


def test_command_line():
    """The published flags parse with Transformers' parser."""
    parser = pytest.importorskip("transformers.hf_argparser", reason="the parser is part of Transformers")
    flags = ["--grad_reg_strength=1e-2", "--grad_reg_eps=1e-3", "--grad_reg_warmup=5"]
    exclude = ["--grad_reg_exclude", "embed", "lm_head"]
    (config,) = parser.HfArgumentParser(GradRegConfig).parse_args_into_dataclasses(flags + exclude)
    assert config == GradRegConfig(1e-2, 1e-3, grad_reg_warmup=5, grad_reg_exclude=["embed", "lm_head"])
    assert config.kwargs()["exclude"] == ("embed", "lm_head")
    (config,) = parser.HfArgumentParser(GradRegConfig).parse_args_into_dataclasses(["--grad_reg_radius", "0.02"])
    assert config.kwargs()["radius"] == 0.02  # the default ε of the parser still counts as a default
