"""The settings: one list, from which keys, checks and command-line flags are derived.

A new setting is added here, to the signature of ``GradRegOptimizer``, which the tests compare with this
list, and where it acts.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, TypedDict, get_args

import torch
from torch import distributed, nn

from gradreg_optim.core.precision import AUTO
from gradreg_optim.core.replicas import has_ranks
from gradreg_optim.wrapping.schedule import NAMES, Schedule, ScheduleName

Method = Literal["forward", "central"]
Rounding = Literal["nearest", "stochastic"]
Resample = Literal["reuse", "sequence"] | None
NormOf = Literal["step", "micro_batch"] | None
Radius = float | Literal["auto"] | None
Strength = float | Literal["auto"]

PUBLISHED: dict[str, Any] = {
    "strength": 1e-2,
    "eps": 1e-3,
    "norm_of": "step",
    "resample": "reuse",
    "rounding": "nearest",
    "check_every": 0,
    "shrink": False,
    "g1_clip": 10.0,
    "g2_clip": 10.0,
}
"""The settings of the published step (arXiv 2602.18037)."""


DELETED = {
    "fraction": "every=k with k times the strength costs as little",
    "memory": "there is one way to keep θ",
    "between": "θ comes back by itself",
    "along": "exclude= says which parameters are perturbed",
}
"""Settings of earlier versions, and what to use instead. Checkpoints with their keys still load."""


class Settings(TypedDict, total=False):
    """The keyword arguments of :class:`~gradreg_optim.GradRegOptimizer`, for type checkers."""

    strength: Strength
    eps: float | None
    radius: Radius
    warmup_steps: int
    schedule: ScheduleName | Schedule | None
    schedule_steps: int | None
    g1_clip: float | None
    g2_clip: float | None
    max_penalty_ratio: float | None
    method: Method
    rounding: Rounding
    check_every: int | None
    shrink: bool
    every: int
    exclude: str | Iterable[str]
    norm_of: NormOf
    resample: Resample
    model: nn.Module | None
    scaler: torch.amp.GradScaler | None


@dataclass(frozen=True)
class Rule:
    """What a value must be, in words and as a test; ``kind`` and ``choices`` are those of the flag."""

    text: str
    kind: Any
    holds: Callable[[Any], bool]
    choices: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Setting:
    """One setting.

    Args:
        name: the keyword argument; ``gradreg_<name>`` in parameter groups.
        default: of the keyword argument.
        rule: what a value must be.
        remedy: what to write instead, for the error message.
        help: what the flag says about itself.
        flag: its name after ``--grad_reg_``, if it is not ``name``.
        flag_default: if a command line cannot say ``default``.
        is_per_group: whether each parameter group is asked; else the first group speaks for all.
        is_key: whether parameter groups carry it.
    """

    name: str
    default: Any
    rule: Rule
    remedy: str
    help: str
    flag: str | None = None
    flag_default: Any = None
    is_per_group: bool = False
    is_key: bool = True


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _positive(value: Any) -> bool:
    return value is None or (_number(value) and 0 < value < math.inf)


def _auto(value: Any) -> bool:
    return isinstance(value, str) and value == AUTO


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _above_zero(value: Any) -> bool:
    return value is None or (_number(value) and value > 0)


def _one_of(kind: Any) -> Rule:
    choices = get_args(kind)
    return Rule(f"one of {choices}", kind, lambda value: isinstance(value, str) and value in choices, choices)


def _none_or_one_of(kind: Any) -> Rule:
    rule = _one_of(get_args(kind)[0])
    return Rule(f"None or {rule.text}", kind, lambda value: value is None or rule.holds(value), rule.choices)


STRENGTH = Rule(
    "'auto' or a finite number >= 0",
    str | None,  # what parsers of command lines allow
    lambda value: _auto(value) or (_number(value) and 0 <= value < math.inf),
)
POSITIVE = Rule("None or a finite number > 0", float | None, _positive)
RADIUS = Rule(
    "None, 'auto' or a finite number > 0", str | None, lambda value: _auto(value) or _positive(value)
)
CLIP = Rule("None or a number > 0", float, _above_zero)
BOUND = Rule("None or a number > 0", float | None, _above_zero)
COUNT = Rule("an integer >= 0", int, _whole)
COUNT_OR_NONE = Rule("None or an integer >= 0", int | None, lambda value: value is None or _whole(value))
PERIOD = Rule("an integer >= 1", int, lambda value: _whole(value) and value >= 1)
PERIOD_OR_NONE = Rule(
    "None or an integer > 0", int | None, lambda value: value is None or (_whole(value) and value > 0)
)
SWITCH = Rule("True or False", bool, lambda value: isinstance(value, bool))
SCHEDULE = Rule(
    f"None, one of {NAMES}, or a callable of the step",
    ScheduleName,
    lambda value: value is None or callable(value) or (isinstance(value, str) and value in NAMES),
    NAMES,
)

# fmt: off
SETTINGS = (
    Setting("strength", AUTO, STRENGTH, "auto finds it in ten steps; 0 switches the penalty off.",
            "Weight γ of the penalty (γ/2)·‖∇L‖²: `auto` finds it in ten steps, 0 switches it off.",
            is_per_group=True),
    Setting("eps", None, POSITIVE, "The published value is 1e-3, the default in full precision.",
            "Finite-difference step ε, in units of the gradient; default: 1e-3, in low "
            "precision radius auto.",
            is_per_group=True),
    Setting("radius", None, RADIUS,
            "Leave it out to use eps, or in low precision 'auto'; fp32 wants about 0.0025.",
            "Length of the finite-difference step, instead of ε; `auto` adapts it, the "
            "default in low precision.",
            is_per_group=True),
    Setting("warmup_steps", 0, COUNT, "It counts optimizer steps without the penalty.",
            "Optimizer steps before the penalty starts.", flag="warmup"),
    Setting("schedule", None, SCHEDULE, "A callable returns the factor on the strength.",
            "Strength after the warm-up.", flag_default="constant"),
    Setting("schedule_steps", None, PERIOD_OR_NONE,
            "It counts the optimizer steps over which the strength rises.",
            "Steps over which a linear or cosine schedule rises; default: all of training."),
    Setting("g1_clip", 10.0, CLIP, "None switches the clip off.",
            "Norm bound on the first gradient; 0: none."),
    Setting("g2_clip", 10.0, CLIP, "None switches the clip off.",
            "Norm bound on the second gradient; 0: none."),
    Setting("max_penalty_ratio", None, BOUND, "None leaves the penalty unbounded.",
            "Bound on ‖penalty‖/‖g1‖; does not bias the difference."),
    Setting("method", "forward", _one_of(Method),
            "forward takes one further gradient, central two, which is as good as double "
            "backward was (0.98 to 0.995).",
            "Estimate of H·d: by one further gradient, or by two."),
    Setting("rounding", "stochastic", _one_of(Rounding),
            "It says how bfloat16 weights take a step smaller than their spacing.",
            "How bfloat16 weights without fp32 masters take the step."),
    Setting("check_every", None, COUNT_OR_NONE,
            "It counts optimizer steps between self-checks; 0 makes none, None one, and "
            "more in low precision.",
            "Steps between self-checks; 0: none. Default: one in the first step, each 100 in low precision."),
    Setting("shrink", True, SWITCH, "True scales the penalty by its share of signal.",
            "Scale the penalty by the share of the difference that is not rounding noise."),
    Setting("every", 1, PERIOD, "1 regularizes every step, k each k-th one.",
            "Regularize each k-th step; wants k times the strength."),
    Setting("norm_of", None, _none_or_one_of(NormOf),
            "micro_batch keeps the penalty whatever the batch, step is the published norm.",
            "Whose gradient has the norm; default: each micro-batch's in trainers.", is_key=False),
    Setting("resample", None, _none_or_one_of(Resample),
            "reuse is the published choice; sequence reweights completions in the second "
            "pass of GRPO and RLOO.",
            "Completions in the second pass of GRPO and RLOO: as they are (reuse), or reweighted "
            "(sequence); default: reweighted where the loss allows it.",
            is_key=False),
)
# fmt: on

PER_GROUP = tuple(setting.name for setting in SETTINGS if setting.is_per_group)
SHARED = tuple(setting.name for setting in SETTINGS if setting.is_key and not setting.is_per_group)
_BY_NAME = {setting.name: setting for setting in SETTINGS}
PLACES = {
    **{
        name: f"Write group['gradreg_{name}'] of every group in optimizer.param_groups."
        for name in (*PER_GROUP, *SHARED)
    },
    **{name: f"Give {name}= to the constructor." for name in ("model", "scaler")},
}
"""Where a setting is changed: none is an attribute of the optimizer."""


def plain(value: Any) -> Any:
    """The number in a NumPy scalar or 0-d tensor, which checkpoints can keep; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def shown(value: Any) -> str:
    """A wrong value as an error message prints it: numbers and short words whole, anything larger by type."""
    text = repr(value) if isinstance(value, (str, int, float, list, tuple, type, type(None))) else ""
    return text if 0 < len(text) <= 80 else f"<{type(value).__name__}>"


def suggestion(name: str, known: Iterable[str], *, prefix: str = "") -> str:
    """The end of an error message: which of the ``known`` names (each after ``prefix``) was meant."""
    bare, known = name.removeprefix("grad_reg_").removeprefix("gradreg_"), sorted(known)
    close = get_close_matches(bare, known, n=1)
    return (
        f"Did you mean '{prefix}{close[0]}'?"
        if close
        else f"Names are {', '.join(prefix + name for name in known)}."
    )


def check_settings(**settings: Any) -> None:
    """Raise ``ValueError`` for the first of the given settings that breaks its rule; unknown names pass."""
    for name, value in settings.items():
        setting = _BY_NAME.get(name)
        if setting is not None and not setting.rule.holds(plain(value)):
            raise ValueError(f"{name}={shown(value)}: {name} must be {setting.rule.text}. {setting.remedy}")
    eps, radius = settings.get("eps"), settings.get("radius")
    if radius is not None and eps is not None:
        raise ValueError(
            f"eps={shown(eps)} and radius={shown(radius)}: both set the length of the same step. "
            "Give eps (a multiple of the gradient) or radius (the length itself), not both."
        )


def check_names(where: str, names: Iterable[str]) -> None:
    """Raise ``TypeError`` for the first of ``names`` that is no setting; it says what to use instead."""
    for name in names:
        if name in DELETED:
            raise TypeError(
                f"{where} got {name!r}, which is no setting any more: {DELETED[name]}. Leave it out."
            )
        if name not in Settings.__annotations__:
            raise TypeError(
                f"{where} got an unexpected setting {name!r}. {suggestion(name, Settings.__annotations__)}"
            )


def say(message: str) -> None:
    """Tell the user something that is no fault, in the log of the first rank."""
    if not (has_ranks() and distributed.get_rank()):
        logging.getLogger("gradreg_optim").warning(message)


def published(given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of :data:`PUBLISHED` that ``given`` leaves open; a radius takes the place of the published ε."""
    known = {*given, *(["eps"] if given.get("radius") is not None else [])}
    return {name: value for name, value in PUBLISHED.items() if name not in known}


def settings_among(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a call's ``arguments`` that are settings, and the defaults of the others."""
    return {setting.name: plain(arguments.get(setting.name, setting.default)) for setting in SETTINGS}


def exclude_patterns(exclude: str | Iterable[str] | None) -> tuple[str, ...]:
    """The patterns of ``exclude`` as a tuple; one string is one pattern, ``None`` is none."""
    if exclude is None:
        return ()
    is_readable = isinstance(exclude, Iterable) and not isinstance(exclude, (bytes, nn.Module, torch.Tensor))
    patterns: tuple[Any, ...] = (exclude,) if isinstance(exclude, str) or not is_readable else tuple(exclude)
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern:
            raise ValueError(
                f"exclude={shown(exclude)}: every pattern must be a non-empty string, a part of parameter "
                "names. Pass, for example, exclude=('embed', 'lm_head')."
            )
    return patterns
