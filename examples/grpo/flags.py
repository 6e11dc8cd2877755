"""The command line of the GRPO examples: an example's own flags, those of TRL, and ``--grad_reg_*``."""

from __future__ import annotations

from typing import Any, NoReturn, TypeAlias, cast

from trl import GRPOConfig, ModelConfig, TrlParser  # type: ignore[attr-defined]

from gradreg_optim import GradRegConfig

__all__ = ["Arguments", "InputError", "Parser", "parse"]

Arguments: TypeAlias = tuple[Any, GRPOConfig, ModelConfig, GradRegConfig]


class InputError(ValueError):
    """A value that the user gave does not work. The message names the value, the rule and the remedy."""


class Parser(TrlParser):
    """A TrlParser that raises its errors; argparse would print them below several hundred flags."""

    def error(self, message: str) -> NoReturn:
        """Raise the message."""
        raise InputError(f"{message} (--help lists the flags and what they take)")


def parse(script: str, argv: list[str], own: type, defaults: dict[str, Any]) -> Arguments:
    """Read the command line.

    Args:
        script: the name to show in ``--help``.
        argv: the command line without the program.
        own: the dataclass of the example's own flags.
        defaults: defaults that replace those of the dataclasses.

    Raises:
        InputError: a flag does not exist, or its value breaks a rule.
    """
    types: Any = (own, GRPOConfig, ModelConfig, GradRegConfig)
    parser: Any = Parser(types, prog=script)
    parser.set_defaults_with_config(**defaults)
    try:
        *arguments, unknown = parser.parse_args_and_config(argv, return_remaining_strings=True)
    except (ValueError, OSError) as error:
        raise InputError(error) from error
    if unknown:
        raise InputError(
            f"{unknown} must be flags of this script, of TRL or of GradRegConfig (--help lists them)"
        )
    return cast(Arguments, tuple(arguments))
