"""Settings: their defaults, their rules, and the dataclass that puts them on a command line."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from gradreg_optim.schedule import NAMES, Schedule

__all__ = [
    "BETWEEN",
    "DEFAULT_CLIP",
    "DEFAULT_EPS",
    "MEMORIES",
    "METHODS",
    "RESAMPLES",
    "ROUNDINGS",
    "GradRegConfig",
    "check_settings",
    "exclude_patterns",
]


class _Default(float):
    """A default that can be told from the same number given by hand."""


DEFAULT_EPS = _Default(1e-3)
DEFAULT_CLIP = _Default(10.0)
METHODS = ("forward", "central", "exact")
ROUNDINGS = ("nearest", "stochastic")
RESAMPLES = ("reuse", "importance", "sequence")
BETWEEN = ("plain", "reuse")
MEMORIES = ("full", "lean")


def exclude_patterns(exclude: str | Iterable[str] | None) -> tuple[str, ...]:
    """The patterns of ``exclude`` as a tuple; one string is one pattern, ``None`` is none."""
    if exclude is None:
        return ()
    patterns = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern:
            raise ValueError(
                f"exclude={exclude!r}: every pattern must be a non-empty string, a part of parameter names. "
                "Pass, for example, exclude=('embed', 'lm_head')."
            )
    return patterns


def check_settings(**settings: Any) -> None:
    """Raise ``ValueError`` for the first of the given settings that breaks its rule; unknown names pass."""
    for name, value in settings.items():
        if name in _RULES:
            rule, remedy, holds = _RULES[name]
            if not holds(value):
                raise ValueError(f"{name}={value!r}: {name} must be {rule}. {remedy}")
    eps, radius = settings.get("eps", DEFAULT_EPS), settings.get("radius")
    if radius is not None and eps is not None and not isinstance(eps, _Default):
        raise ValueError(
            f"eps={eps!r} and radius={radius!r}: both set the length of the same step. "
            "Give eps (a multiple of the gradient) or radius (the length itself), not both."
        )
    if settings.get("memory") == "lean":
        _check_lean(settings)


def _check_lean(settings: dict[str, Any]) -> None:
    """Refuse what needs both gradients side by side."""
    clip = settings.get("g2_clip")
    conflicts = {
        "method": settings.get("method", "forward") != "forward",
        "g2_clip": clip is not None and not isinstance(clip, _Default),
        "max_penalty_ratio": settings.get("max_penalty_ratio") is not None,
        "check_every": bool(settings.get("check_every")),
        "between": settings.get("between", "plain") != "plain",
        "fraction": settings.get("fraction", 1.0) != 1.0,
    }
    for name, conflict in conflicts.items():
        if conflict:
            raise ValueError(
                f"memory='lean' and {name}={settings[name]!r}: the second gradient is added to the first as it arrives, and "
                f"{name} needs both of them side by side. Leave {name} at its default, or use memory='full'."
            )


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _positive(value: Any) -> bool:
    return _number(value) and 0 < value < math.inf


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _clip(value: Any) -> bool:
    return value is None or (_number(value) and value > 0)


_RULES: dict[str, tuple[str, str, Callable[[Any], bool]]] = {
    "strength": (
        "a finite number >= 0",
        "Published values are 1e-2 and 1e-3; 0 switches off.",
        lambda value: _number(value) and 0 <= value < math.inf,
    ),
    "eps": (
        "a finite number > 0",
        "The published value is 1e-3.",
        lambda value: value is None or _positive(value),
    ),
    "radius": (
        "None or a finite number > 0",
        "Leave it out to use eps; fp32 wants about 0.0025, fp16 and bf16 0.005.",
        lambda value: value is None or _positive(value),
    ),
    "warmup_steps": ("an integer >= 0", "It counts optimizer steps without the penalty.", _whole),
    "schedule": (
        f"None, one of {NAMES}, or a callable of the step",
        "A callable returns the factor on the strength.",
        lambda value: value is None or value in NAMES or callable(value),
    ),
    "schedule_steps": (
        "None or an integer > 0",
        "It counts the optimizer steps over which the strength rises.",
        lambda value: value is None or (_whole(value) and value > 0),
    ),
    "g1_clip": ("None or a number > 0", "None switches the clip off.", _clip),
    "g2_clip": ("None or a number > 0", "None switches the clip off.", _clip),
    "max_penalty_ratio": ("None or a number > 0", "None leaves the penalty unbounded.", _clip),
    "resample": (
        f"one of {RESAMPLES}",
        "reuse is the published choice; the others reweight the completions of GRPO, RLOO and kin in the second pass.",
        lambda value: isinstance(value, str) and value in RESAMPLES,
    ),
    "method": (
        f"one of {METHODS}",
        "forward takes one further gradient, central two, exact differentiates twice.",
        lambda value: isinstance(value, str) and value in METHODS,
    ),
    "rounding": (
        f"one of {ROUNDINGS}",
        "It says how bfloat16 weights take a step smaller than their spacing.",
        lambda value: isinstance(value, str) and value in ROUNDINGS,
    ),
    "check_every": (
        "None or an integer >= 0",
        "It counts optimizer steps between self-checks; 0 makes none, None only in low precision.",
        lambda value: value is None or _whole(value),
    ),
    "every": (
        "an integer >= 1",
        "1 regularizes every step, k each k-th one.",
        lambda value: _whole(value) and value >= 1,
    ),
    "between": (
        f"one of {BETWEEN}",
        "It says what the steps between two regularized ones use: g1, or g1 and the last penalty.",
        lambda value: isinstance(value, str) and value in BETWEEN,
    ),
    "fraction": (
        "a number > 0 and <= 1",
        "0.25 takes the difference on a quarter of the micro-batches.",
        lambda value: _number(value) and 0 < value <= 1,
    ),
    "memory": (
        f"one of {MEMORIES}",
        "lean adds the second gradient to the first as it arrives, instead of keeping both.",
        lambda value: isinstance(value, str) and value in MEMORIES,
    ),
    "shrink": ("True or False", "True scales the penalty by its share of signal.", lambda value: isinstance(value, bool)),
}


@dataclass
class GradRegConfig:
    """The settings of :class:`~gradreg_optim.GradRegOptimizer` as command-line flags.

    Made for ``TrlParser((GRPOConfig, ModelConfig, GradRegConfig))`` and ``HfArgumentParser``; :meth:`kwargs` turns it
    into the optimizer's keyword arguments. Defaults are those of the published implementation.

    Raises:
        ValueError: a value breaks its rule; the message names value, rule and remedy.

    >>> GradRegConfig(grad_reg_strength=1e-2).kwargs()["strength"]
    0.01
    """

    grad_reg_strength: float = field(
        default=1e-3, metadata={"help": "Weight γ of the penalty (γ/2)·‖∇L‖². 0 switches it off."}
    )
    grad_reg_eps: float = field(
        default=DEFAULT_EPS, metadata={"help": "Finite-difference step ε, in units of the gradient."}
    )
    grad_reg_radius: float | None = field(
        default=None,
        metadata={"help": "Length of the finite-difference step, instead of ε; 0.0025 in fp32, 0.005 in fp16 and bf16."},
    )
    grad_reg_warmup: int = field(default=0, metadata={"help": "Optimizer steps before the penalty starts."})
    grad_reg_schedule: str = field(
        default="constant", metadata={"help": "Strength after the warm-up.", "choices": list(NAMES)}
    )
    grad_reg_schedule_steps: int | None = field(
        default=None,
        metadata={"help": "Steps over which a linear or cosine schedule rises; default: all of training."},
    )
    grad_reg_g1_clip: float = field(default=10.0, metadata={"help": "Norm bound on the first gradient; 0: none."})
    grad_reg_g2_clip: float = field(default=DEFAULT_CLIP, metadata={"help": "Norm bound on the second gradient; 0: none."})
    grad_reg_max_penalty_ratio: float | None = field(
        default=None, metadata={"help": "Bound on ‖penalty‖/‖g1‖; does not bias the difference."}
    )
    grad_reg_method: str = field(
        default="forward",
        metadata={"help": "Estimate of H·d: one further gradient, two, or double backward.", "choices": list(METHODS)},
    )
    grad_reg_rounding: str = field(
        default="stochastic",
        metadata={"help": "How bfloat16 weights without fp32 masters take the step.", "choices": list(ROUNDINGS)},
    )
    grad_reg_check_every: int | None = field(
        default=None,
        metadata={"help": "Steps between self-checks of the difference; 0: none. Default: 100 in low precision."},
    )
    grad_reg_shrink: bool = field(
        default=True, metadata={"help": "Scale the penalty by the share of the difference that is not rounding noise."}
    )
    grad_reg_every: int = field(default=1, metadata={"help": "Regularize each k-th step; wants k times the strength."})
    grad_reg_between: str = field(
        default="plain",
        metadata={
            "help": "The steps between regularized ones: without penalty, or with the last one.",
            "choices": list(BETWEEN),
        },
    )
    grad_reg_fraction: float = field(
        default=1.0, metadata={"help": "Fraction of a step's micro-batches that make the difference."}
    )
    grad_reg_memory: str = field(
        default="full",
        metadata={"help": "Keep both gradients, or add the second to the first as it arrives.", "choices": list(MEMORIES)},
    )
    grad_reg_exclude: list[str] | None = field(
        default=None,
        metadata={
            "help": "Parts of parameter names left out of the penalty; `none` leaves out nothing. "
            "Default: embeddings, output layer and value or reward heads, found as modules."
        },
    )
    grad_reg_resample: str = field(
        default="reuse",
        metadata={
            "help": "Completions in the second pass of GRPO, RLOO and kin: as they are, or reweighted, by tokens or whole.",
            "choices": list(RESAMPLES),
        },
    )

    def __post_init__(self) -> None:
        """Check every value."""
        settings = self.kwargs()
        exclude_patterns(settings.pop("exclude"))
        check_settings(**settings)

    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments for :class:`~gradreg_optim.GradRegOptimizer`."""
        schedule: str | Schedule = self.grad_reg_schedule
        return {
            "strength": self.grad_reg_strength,
            "eps": self.grad_reg_eps,
            "radius": self.grad_reg_radius,
            "warmup_steps": self.grad_reg_warmup,
            "schedule": schedule,
            "schedule_steps": self.grad_reg_schedule_steps,
            # A command line cannot say None; 0 is the Trainer's way to switch a clip off.
            "g1_clip": None if self.grad_reg_g1_clip == 0 else self.grad_reg_g1_clip,
            "g2_clip": None if self.grad_reg_g2_clip == 0 else self.grad_reg_g2_clip,
            "max_penalty_ratio": self.grad_reg_max_penalty_ratio,
            "method": self.grad_reg_method,
            "rounding": self.grad_reg_rounding,
            "check_every": self.grad_reg_check_every,
            "shrink": self.grad_reg_shrink,
            "every": self.grad_reg_every,
            "between": self.grad_reg_between,
            "fraction": self.grad_reg_fraction,
            "memory": self.grad_reg_memory,
            "exclude": tuple(self.grad_reg_exclude or ()),
            "resample": self.grad_reg_resample,
        }
