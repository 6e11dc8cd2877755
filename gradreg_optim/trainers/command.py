"""The command ``gradreg``: TRL's own training scripts, with the settings of the penalty as arguments.

::

    gradreg sft --config sft.yaml                                     # the file has grad_reg_strength: 0.3
    gradreg grpo --model_name_or_path … --grad_reg_strength 0.3       # or a flag
    accelerate launch --config_file zero2.yaml -m gradreg_optim sft --config sft.yaml

Relied upon (trl 0.27 to 1.16): each script in ``trl.scripts`` has ``make_parser()``, whose
``dataclass_types`` are the arguments of ``main``, and builds a trainer there and calls its ``train()``.
"""

import pkgutil
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import fields
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import trl.scripts
from transformers import Trainer
from trl.scripts.utils import TrlParser

from gradreg_optim.config import GradRegConfig
from gradreg_optim.trainers.attach import attach
from gradreg_optim.trainers.patches import Patches

# What in ``trl.scripts`` does not train.
_OTHERS = ("env", "utils", "vllm_serve")


def main(argv: Sequence[str] | None = None) -> None:
    """Train as ``trl`` does with the same arguments, regularized by those that begin with ``--grad_reg_``.

    Raises:
        SystemExit: the script or an argument is unknown; the message names it.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    names = [module.name for module in pkgutil.iter_modules(trl.scripts.__path__)]
    command = ArgumentParser("gradreg", description="TRL's training scripts with gradient regularization.")
    command.add_argument("script", choices=[name for name in names if name not in _OTHERS and name[0] != "_"])
    name = command.parse_args(arguments[:1]).script
    script = import_module(f"trl.scripts.{name}")
    dataclasses: list[Any] = [*script.make_parser().dataclass_types, GradRegConfig]
    parser: Any = TrlParser(dataclasses, prog=f"gradreg {name}")
    *given, config, unknown = parser.parse_args_and_config(arguments[1:], return_remaining_strings=True)
    if unknown:
        parser.error(_about(unknown))

    def train(train: Callable[..., Any], trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
        attach(trainer, config)
        return train(trainer, *args, **kwargs)

    with Patches() as patches:
        patches.answer(Trainer, "train", train)
        script.main(*given)


def _about(unknown: Sequence[str]) -> str:
    """The message about arguments that the script does not have, from the command line or a file."""
    flags = [word for word in unknown if word.startswith("--")] or list(unknown)
    close = [
        get_close_matches(flag.lstrip("-"), [f.name for f in fields(GradRegConfig)], n=1) for flag in flags
    ]
    meant = ", ".join(f"--{match[0]}" for match in close if match)
    return f"unknown arguments: {', '.join(flags)}. " + (
        f"Did you mean {meant}?"
        if meant
        else "Those of accelerate are written there: accelerate launch … -m gradreg_optim …"
    )
