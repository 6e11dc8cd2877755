"""The optimizers that GradRegOptimizer is compared with: they take a second gradient, and come as their
packages ship them.

``PEERS`` names each one's package and builds a step. A measurement leaves out those whose package is not
installed; :func:`missing` lists them. ``CANNOT_RUN`` lists those that do not run with this version of torch.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import distribution
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

from benchmarks.common.results import version_of
from benchmarks.cost.subject import Step, Subject

__all__ = ["CANNOT_RUN", "PEERS", "Peer", "composer_sam", "described", "missing", "present"]

CANNOT_RUN = {
    "trl_gradientregularization": "the published implementation: a mixin for the trainers of trl 0.27.2; "
    "it is not an optimizer, has no step of its own, and is not on PyPI",
    "gnp": "JAX; no step of it could be compared with a torch step",
    "optax.contrib.sam": "JAX, likewise",
    "davda54/sam": "not on PyPI under that name; zij ships the same class",
}
"""Optimizers that are not measured, each with the reason."""


@dataclass(frozen=True)
class Peer:
    """One optimizer: its package on PyPI, a function that builds a step, and a note about its row.

    ``period`` is the number of steps after which its cost repeats. ``has_own_tensors``: its first step makes
    an optimizer state or weights of its own, which do not count as its cost.
    """

    package: str
    build: Callable[[Subject], Step]
    note: str = ""
    period: int = 1
    has_own_tensors: bool = False


def _sam(subject: Subject) -> Step:
    from pytorch_optimizer import SAM

    return _with_closure(SAM(subject.parameters, base_optimizer=subject.adamw, rho=0.05, lr=1e-5), subject)


def _looksam(subject: Subject) -> Step:
    from pytorch_optimizer import LookSAM

    optimizer = LookSAM(subject.parameters, base_optimizer=subject.adamw, rho=0.1, k=4, lr=1e-5)
    for group in optimizer.param_groups:  # it would count from AdamW's steps, which other variants have taken
        group["looksam_step"] = 0

    def step() -> None:
        if optimizer.get_step() % optimizer.k == 0:  # only these steps need a gradient before they are called
            subject.closure()
        optimizer.step(subject.closure)

    return step


def _with_closure(optimizer: Any, subject: Subject) -> Step:
    """A step of an optimizer that needs the first gradient before it is called."""
    return lambda: (subject.closure(), optimizer.step(subject.closure))


def _wsam(subject: Subject) -> Step:
    from pytorch_optimizer import WSAM

    optimizer = WSAM(subject.model, subject.parameters, base_optimizer=subject.adamw, rho=0.05, lr=1e-5)
    return lambda: optimizer.step(subject.closure)


def _zij(subject: Subject) -> Step:
    from zij import SAM

    optimizer = SAM(subject.parameters, subject.adamw, rho=0.05, lr=1e-5)
    return _with_closure(optimizer, subject)


def _sam_pytorch(subject: Subject) -> Step:
    from sam import SAM

    optimizer = SAM(subject.parameters, subject.adamw(subject.parameters), rho=0.05)
    return lambda: optimizer.step(subject.closure)


def _composer(subject: Subject) -> Step:
    optimizer = composer_sam().SAMOptimizer(subject.adamw(subject.parameters), rho=0.05)
    return lambda: optimizer.step(lambda **_: subject.closure())


def composer_sam() -> ModuleType:
    """The file of Composer that holds its SAM, loaded without its package.

    The package pins torch below 2.7.1 and cannot be imported with a newer one (its torchvision is of another
    build). The optimizer uses nothing of the package, so the file's other imports get stand-ins.
    """
    names = (
        "composer",
        "composer.core",
        "composer.loggers",
        "composer.trainer",
        "composer.trainer._scaler",
        "composer.utils",
    )
    path = distribution("mosaicml").locate_file("composer/algorithms/sam/sam.py")
    spec = importlib.util.spec_from_file_location("composer_sam", str(path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = {name: sys.modules.get(name) for name in names}
    core = MagicMock()
    core.Algorithm = object
    sys.modules |= {name: core if name == "composer.core" else MagicMock() for name in names}
    try:
        spec.loader.exec_module(module)
    finally:
        for name, loaded in before.items():
            if loaded is None:
                del sys.modules[name]
            else:
                sys.modules[name] = loaded
    return module


def _heavyball(subject: Subject) -> Step:
    import heavyball

    heavyball.utils.compile_mode = None
    optimizer = heavyball.SAMWrapper(subject.parameters, heavyball.AdamW(subject.parameters, lr=1e-5))
    return lambda: optimizer.step(subject.closure)


PEERS = {
    "SAM": Peer("pytorch_optimizer", _sam),
    "WSAM": Peer("pytorch_optimizer", _wsam),
    "LookSAM, k=4": Peer("pytorch_optimizer", _looksam, "takes a second gradient in every 4th step", 4),
    "Composer SAM": Peer(
        "mosaicml",
        _composer,
        "only its file is loaded: the package pins torch < 2.7.1 and cannot be imported here",
    ),
    "HeavyBall SAMWrapper": Peer(
        "heavyball",
        _heavyball,
        "wraps only HeavyBall's own AdamW, so its base step differs; not compiled, because that took 73 s "
        "at 10 M parameters and made no step shorter",
        has_own_tensors=True,
    ),
    "davda54's SAM": Peer("zij", _zij, "restores θ by rebinding `.data`", has_own_tensors=True),
    "sam.pytorch": Peer("sam-pytorch", _sam_pytorch, "restores θ by subtraction, so not bit for bit"),
}


def present() -> dict[str, Peer]:
    """The optimizers whose packages are installed."""
    return {name: peer for name, peer in PEERS.items() if version_of(peer.package)}


def missing() -> dict[str, str]:
    """The optimizers whose packages are not installed, each with the name of its package."""
    return {
        name: f"{peer.package} is not installed here"
        for name, peer in PEERS.items()
        if not version_of(peer.package)
    }


def described(name: str) -> str:
    """A row's name, with its package and version."""
    if name not in PEERS:
        return name
    package = PEERS[name].package
    return f"{name} ({package} {version_of(package)})"
