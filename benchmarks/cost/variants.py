"""One step of each variant, all on the same model."""

from __future__ import annotations

from typing import Any

from benchmarks.cost.peers import PEERS, present
from benchmarks.cost.subject import Step, Subject
from gradreg_optim import GradRegOptimizer

__all__ = ["GRADIENTS", "NAME", "OURS", "PERIODS", "ours", "variants"]

NAME = "GradRegOptimizer"
OURS: dict[str, dict[str, Any]] = {NAME: {}, f"{NAME}, every=4": {"every": 4}}
"""The rows of GradRegOptimizer, with its settings."""
PERIODS = {f"{NAME}, every=4": 4} | {name: peer.period for name, peer in PEERS.items()}
GRADIENTS = {"base": 1.0, f"{NAME}, every=4": 1.25, "LookSAM, k=4": 1.25}
"""The mean number of gradients in a step; 2 for the variants that are not listed."""


def variants(subject: Subject, *, peers: bool = True) -> dict[str, Step]:
    """One step of each variant."""
    optimizer = subject.adamw(subject.parameters)
    steps: dict[str, Step] = {
        "base": lambda: (subject.closure(), optimizer.step()),
        "floor": lambda: (subject.closure(), subject.closure(), optimizer.step()),
        **{name: ours(subject, **settings) for name, settings in OURS.items()},
    }
    return steps | {name: peer.build(subject) for name, peer in present().items() if peers}


def ours(subject: Subject, **settings: Any) -> Step:
    """A step of GradRegOptimizer."""
    wrapper = GradRegOptimizer(subject.adamw(subject.parameters), **settings)
    return lambda: wrapper.step(subject.closure)
