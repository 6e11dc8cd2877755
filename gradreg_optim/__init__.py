"""Gradient regularization as an optimizer wrapper (arXiv 2602.18037).

``import gradreg_optim`` needs torch alone; what stands on other libraries is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gradreg_optim.by_name import GradReg
from gradreg_optim.config import GradRegConfig
from gradreg_optim.core.step import Point
from gradreg_optim.optimizer import GradRegOptimizer
from gradreg_optim.reweighting import reweighted
from gradreg_optim.wrapping.settings import PUBLISHED

if TYPE_CHECKING:
    from gradreg_optim.trainers.attach import GradRegCallback, attach, detach
    from gradreg_optim.zero import ZeroGradRegOptimizer

__version__ = "0.1.0"
__all__ = [
    "PUBLISHED",
    "GradReg",
    "GradRegCallback",
    "GradRegConfig",
    "GradRegOptimizer",
    "Point",
    "ZeroGradRegOptimizer",
    "attach",
    "detach",
    "reweighted",
]

_LAZY = {
    "GradRegCallback": "gradreg_optim.trainers.attach",
    "ZeroGradRegOptimizer": "gradreg_optim.zero",
    "attach": "gradreg_optim.trainers.attach",
    "detach": "gradreg_optim.trainers.attach",
}


def import_part(module: str, what: str) -> Any:
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


def __getattr__(name: str) -> Any:
    """Import the part that provides ``name``."""
    if name in _LAZY:
        return getattr(import_part(_LAZY[name], f"gradreg_optim.{name}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
