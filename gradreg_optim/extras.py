"""Imports of parts that stand on other libraries, which come with extras of this package."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def import_part(module: str, what: str) -> ModuleType:
    """Import ``module``, which provides ``what``.

    Raises:
        ImportError: it cannot be imported; the message names the extra that installs what it needs.
    """
    try:
        return import_module(module)
    except ImportError as error:
        extra = "deepspeed" if module.startswith("gradreg_optim.zero") else "trl"
        raise ImportError(
            f"{what} needs packages that are missing or do not fit ({error}). Install them with its extra: "
            f"pip install 'gradreg_optim[{extra}]'.",
            name=error.name,
        ) from error
