"""The one arrow upwards: a wrapper that a trainer drives finds its trainer, in a package that imports this one.

Modules are imported by name, and only once Transformers is there: ``import gradreg_optim`` needs torch alone.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any


def announce() -> None:
    """A wrapper was built: Transformers' DeepSpeed integration has to be told that there are any."""
    if "transformers.trainer" in sys.modules:
        import_module("gradreg_optim.trainers.attach")


def attach_to_caller(optimizer: Any) -> None:
    """Let a trainer whose ``training_step`` is calling know the optimizer; do nothing if there is none."""
    if "transformers" in sys.modules:
        import_module("gradreg_optim.trainers.attach").attach_to_caller(optimizer)
