"""The arms of the study: what is done, or not, to keep the policy from hacking the proxy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from gradreg_optim import GradRegOptimizer

UNNOTICED = {"strength": 1e-12}
"""A penalty below the rounding of float32 when it is added: training is the plain one, and the wrapper measures."""

EPS, RADIUS = 1e-2, 0.03
"""Where the second gradient is taken. ‖g1‖ is near 0.3 here, so the step of RADIUS is ten times as long as that of EPS."""

PLAIN = "none"
"""The family of the unregularized run."""
STOPPED = "early stopping"
"""The family that is computed from the runs of PLAIN."""


@dataclass(frozen=True)
class Arm:
    """Settings of one arm: of the wrapper, of GRPOConfig, a factor on the learning rate, and the direction of the step."""

    name: str
    wrapper: dict[str, Any] = field(default_factory=lambda: dict(UNNOTICED))
    trainer: dict[str, Any] = field(default_factory=dict)
    rate: float = 1.0
    direction: str = "gradient"

    def optimizer(self, *args: Any, **settings: Any) -> GradRegOptimizer:
        """The wrapper of this arm."""
        kind = RandomDirection if self.direction == "random" else GradRegOptimizer
        return kind(*args, **{**settings, **self.wrapper})


class RandomDirection(GradRegOptimizer):
    """The second gradient at θ + a random step as long as ε·g1, in place of that step: is it the direction that counts?"""

    @contextmanager
    def _perturbed(self, first: Any, distance: float) -> Iterator[None]:
        gradients = [share.g1 for share in first.shares]
        for share in first.shares:
            noise = [torch.randn(g.shape, generator=self._noise()) for g in share.g1]
            scale = _norm(share.g1) / _norm(noise) if noise else 1.0
            share.g1 = [part * scale for part in noise]
        try:
            with super()._perturbed(first, distance):
                yield
        finally:
            for share, g1 in zip(first.shares, gradients, strict=True):
                share.g1 = g1

    def _noise(self) -> torch.Generator:
        """Random numbers of its own: those of the training stay as they are."""
        if not hasattr(self, "_generator"):
            self._generator = torch.Generator().manual_seed(0)
        return self._generator


def _norm(tensors: list[torch.Tensor]) -> float:
    return float(sum(float(tensor.square().sum()) for tensor in tensors)) ** 0.5


def _regularized(name: str, strengths: tuple[float, ...], **settings: Any) -> list[Arm]:
    return [Arm(f"{name}-{strength:g}", {"strength": strength, **settings}) for strength in strengths]


STRENGTHS = (0.3, 1.0, 3.0, 10.0)

FAMILIES: dict[str, list[Arm]] = {
    PLAIN: [Arm("none")],
    "lower rate": [Arm(f"rate-{rate:g}", rate=rate) for rate in (0.5, 0.25, 0.125, 0.0625)],
    "KL penalty": [Arm(f"kl-{beta:g}", trainer={"beta": beta}) for beta in (0.03, 0.1, 0.3, 1.0)],
    "reference resets": [
        Arm(
            f"resets-{beta:g}-{every}",
            trainer={"beta": beta, "sync_ref_model": True, "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": every},
        )
        for beta, every in ((0.1, 40), (0.1, 20), (0.3, 40), (0.3, 20))
    ],
    "GR eps": _regularized("gr-eps", STRENGTHS, eps=EPS),
    "GR radius": _regularized("gr-radius", STRENGTHS, radius=RADIUS),
    "GR importance": _regularized("gr-importance", STRENGTHS, eps=EPS, resample="importance"),
    "GR sequence": _regularized("gr-sequence", STRENGTHS, eps=EPS, resample="sequence"),
}
"""The settings among which each family is tuned: as many for one as for another, but for the plain run, which has none."""


def ablations(chosen: Arm) -> dict[str, Arm]:
    """What of a regularized arm does the work? Each differs from ``chosen`` in one thing, and is not tuned."""

    def other(name: str, **settings: Any) -> Arm:
        return Arm(f"{chosen.name}-{name}", {**chosen.wrapper, **settings})

    return {
        "random direction": replace(chosen, name=f"{chosen.name}-random", direction="random"),
        "SAM (γ = ε)": other("sam", eps=chosen.wrapper["strength"]),
        "embeddings and head too": other("all", exclude="none"),
        "penalty at most ‖g1‖": other("bounded", max_penalty_ratio=1.0),
    }


SMALL = (PLAIN, "gr-sequence-1")
"""The small study: the plain run against the setting that the full one chose."""
