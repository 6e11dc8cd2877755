"""The settings on a command line: a dataclass, derived from :data:`gradreg_optim.wrapping.settings.SETTINGS`."""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass
from typing import Any

from gradreg_optim.wrapping.settings import SETTINGS, Setting, check_settings, exclude_patterns

EXCLUDE = (
    "Parts of parameter names left out of the penalty; `none` leaves out nothing. "
    "Default: embeddings, output layer and value or reward heads, found as modules."
)


def _flag(setting: Setting) -> str:
    return f"grad_reg_{setting.flag or setting.name}"


def _field(setting: Setting) -> tuple[str, Any, Any]:
    default = setting.default if setting.flag_default is None else setting.flag_default
    metadata: dict[str, Any] = {"help": setting.help}
    if setting.rule.choices is not None:
        metadata["choices"] = list(setting.rule.choices)
    return _flag(setting), setting.rule.kind, field(default=default, metadata=metadata)


_Flags: Any = make_dataclass(
    "_Flags",
    [*map(_field, SETTINGS), ("grad_reg_exclude", list[str] | None, field(default=None, metadata={"help": EXCLUDE}))],
)


@dataclass
class GradRegConfig(_Flags):  # type: ignore[misc]
    """The settings of :class:`~gradreg_optim.GradRegOptimizer` as command-line flags, ``grad_reg_strength`` and so on.

    Made for ``TrlParser((GRPOConfig, ModelConfig, GradRegConfig))`` and ``HfArgumentParser``; :meth:`kwargs` turns it
    into the optimizer's keyword arguments. Defaults are those of the published implementation.

    Raises:
        ValueError: a value breaks its rule; the message names value, rule and remedy.

    >>> GradRegConfig(grad_reg_strength=1e-2).kwargs()["strength"]
    0.01
    """

    def __post_init__(self) -> None:
        """Check every value."""
        settings = self.kwargs()
        exclude_patterns(settings.pop("exclude"))
        check_settings(**settings)

    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments for :class:`~gradreg_optim.GradRegOptimizer`."""
        kwargs = {setting.name: getattr(self, _flag(setting)) for setting in SETTINGS}
        for clip in ("g1_clip", "g2_clip"):  # a command line cannot say None; 0 is the Trainer's way to switch a clip off
            kwargs[clip] = kwargs[clip] or None
        return {**kwargs, "exclude": tuple(self.grad_reg_exclude or ())}
