"""Finds the settings of the penalty, called ``grad_reg_<name>``, among the arguments of a stack."""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from gradreg_optim.config import GradRegConfig
from gradreg_optim.wrapping.settings import suggestion

NAMES = tuple(field.name for field in fields(GradRegConfig))


def of_penalty(names: Iterable[str]) -> list[str]:
    """Those of a stack's argument ``names`` that are settings of the penalty.

    Raises:
        ValueError: one begins like a setting and is none, so that nobody would read it.
    """
    ours = [name for name in names if name.startswith(("grad_reg", "gradreg"))]
    for name in ours:
        if name not in NAMES:
            meant = suggestion(name, (known.removeprefix("grad_reg_") for known in NAMES), prefix="grad_reg_")
            raise ValueError(f"unknown setting {name!r}. {meant}")
    return ours


def parted(arguments: Mapping[str, Any]) -> tuple[GradRegConfig, dict[str, Any]]:
    """Part ``arguments`` into the settings of the penalty and what remains for the stack.

    Raises:
        ValueError: a setting is unknown, or its value breaks its rule.
    """
    ours = {name: arguments[name] for name in of_penalty(arguments)}
    return GradRegConfig(**ours), {name: value for name, value in arguments.items() if name not in ours}
