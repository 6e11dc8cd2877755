"""The settings on a command line: a dataclass made from :data:`gradreg_optim.wrapping.settings.SETTINGS`."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, make_dataclass
from typing import Any, get_args

from gradreg_optim.wrapping.settings import SETTINGS, Setting, check_settings, exclude_patterns, published

EXCLUDE = (
    "Parts of parameter names left out of the penalty; `none` leaves out nothing. "
    "Default: embeddings, output layer and value or reward heads, found as modules."
)

AS_PUBLISHED = "The settings of the published step, where no other flag says otherwise."


def _flag(setting: Setting) -> str:
    return f"grad_reg_{setting.flag or setting.name}"


def _field(setting: Setting) -> tuple[str, Any, Any]:
    choices = {} if setting.rule.choices is None else {"choices": list(setting.rule.choices)}
    default = setting.default if setting.flag_default is None else setting.flag_default
    return (
        _flag(setting),
        setting.rule.kind,
        field(default=default, metadata={"help": setting.help, **choices}),
    )


def from_text(value: Any, kind: Any) -> Any:
    """The number that a text holds, where a number is wanted; anything else as it is."""
    kinds = (kind, *get_args(kind))
    number = int if int in kinds else float if float in kinds or kinds[1:2] == (str,) else None
    if isinstance(value, str) and number is not None:
        with suppress(ValueError):  # no number at all: the check names it
            return number(value)
    return value


_Flags: Any = make_dataclass(
    "_Flags",
    [
        *map(_field, SETTINGS),
        ("grad_reg_exclude", list[str] | None, field(default=None, metadata={"help": EXCLUDE})),
        ("grad_reg_published", bool, field(default=False, metadata={"help": AS_PUBLISHED})),
    ],
)


@dataclass
class GradRegConfig(_Flags):  # type: ignore[misc]
    """The settings of :class:`~gradreg_optim.GradRegOptimizer` as flags, ``grad_reg_strength`` and so on.

    Made for ``TrlParser((GRPOConfig, ModelConfig, GradRegConfig))`` and ``HfArgumentParser``; :meth:`kwargs`
    turns it into the optimizer's keyword arguments, whose defaults it has.

    Raises:
        ValueError: a value breaks its rule; the message names value, rule and remedy.

    >>> GradRegConfig(grad_reg_strength="1e-2").kwargs()["strength"]
    0.01
    """

    def __post_init__(self) -> None:
        """Check every value; numbers may be text, as YAML reads ``1e-3``."""
        for setting in SETTINGS:
            setattr(self, _flag(setting), from_text(getattr(self, _flag(setting)), setting.rule.kind))
        check_settings(**self.kwargs())

    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments for :class:`~gradreg_optim.GradRegOptimizer`."""
        kwargs = {setting.name: getattr(self, _flag(setting)) for setting in SETTINGS}
        # A command line cannot say None; 0 is the Trainer's way to switch a clip off.
        for clip in ("g1_clip", "g2_clip"):
            kwargs[clip] = kwargs[clip] or None
        if self.grad_reg_published:
            given = {s.name: kwargs[s.name] for s in SETTINGS if kwargs[s.name] != s.default}
            kwargs |= published(given)
        return {**kwargs, "exclude": exclude_patterns(self.grad_reg_exclude)}


def as_flags(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of :class:`~gradreg_optim.GradRegOptimizer` under their flags' names, for run logs.

    Arguments that are not given have their defaults; a callable is replaced by its name.
    """
    flags = {_flag(setting): settings.get(setting.name, setting.default) for setting in SETTINGS}
    flags["grad_reg_schedule"] = flags["grad_reg_schedule"] or "constant"
    names = {
        flag: getattr(value, "__name__", type(value).__name__)
        for flag, value in flags.items()
        if callable(value)
    }
    return {**flags, **names, "grad_reg_exclude": list(exclude_patterns(settings.get("exclude"))) or None}
