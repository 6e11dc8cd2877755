"""The arms of the study: what is done, or not, to keep the policy from hacking the proxy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from gradreg_optim import GradRegOptimizer
from gradreg_optim.phases import WHOLE

UNNOTICED = {"strength": 1e-12}
"""A penalty below the rounding of float32 when it is added: training is the plain one, and the wrapper measures."""

EPS, RADIUS = 1e-2, 0.03
"""Where the second gradient is taken. ‖g1‖ is near 0.3 here, so the step of RADIUS is ten times as long as that of EPS."""

PLAIN = "none"
"""The family of the unregularized run."""
LOWER = "lower rate"
"""The family of the plain run whose learning rate is tuned as that of every other family is."""
STOPPED = "early stopping"
"""The family that is computed from the runs of PLAIN."""


@dataclass(frozen=True)
class Arm:
    """Settings of one arm.

    Args:
        name: the file of its runs begins with it.
        wrapper: settings of the wrapper.
        trainer: settings of GRPOConfig.
        rate: a factor on the learning rate.
        direction: where the second gradient is taken: along the "gradient", a "random" direction, or the gradient of the
            "previous" step.
        weights: "float32"; "bfloat16", without masters; or "rounded", float32 that every step rounds to bfloat16's grid.
    """

    name: str
    wrapper: dict[str, Any] = field(default_factory=lambda: dict(UNNOTICED))
    trainer: dict[str, Any] = field(default_factory=dict)
    rate: float = 1.0
    direction: str = "gradient"
    weights: str = "float32"

    def dressed(self, policy: nn.Module) -> nn.Module:
        """The policy, its weights as this arm keeps them."""
        if self.weights == "rounded":
            round_(policy.parameters())
        return policy.to(torch.bfloat16) if self.weights == "bfloat16" else policy

    def optimizer(self, base: torch.optim.Optimizer, **settings: Any) -> GradRegOptimizer:
        """The wrapper of this arm around ``base``."""
        if self.weights == "rounded":
            base.register_step_post_hook(lambda stepped, *_: round_(p for g in stepped.param_groups for p in g["params"]))
        settings = {**settings, **self.wrapper}
        return (
            GradRegOptimizer(base, **settings) if self.direction == "gradient" else Aside(self.direction, base, **settings)
        )


@torch.no_grad()
def round_(parameters: Iterable[torch.Tensor]) -> None:
    """Round to the nearest numbers of bfloat16, in place: what copying bf16 weights over their fp32 masters does."""
    for parameter in parameters:
        parameter.copy_(parameter.to(torch.bfloat16))


class Aside(GradRegOptimizer):
    """The second gradient elsewhere than at θ + ε·g1, at the same distance: is it the direction that counts?

    "random": no direction in particular. "previous": along the gradient of the step before, whose batch is another one.
    Then E[H·d] = H·∇L, without what the noise that H and d share in one batch adds to it.
    """

    def __init__(self, direction: str, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._direction = direction
        self._before: list[list[torch.Tensor]] | None = None

    @contextmanager
    def _perturbed(self, first: Any, distance: float) -> Iterator[None]:
        gradients = [share.g1 for share in first.shares]
        length = _norm([x for g1 in gradients for x in g1])
        aside = self._aside(gradients)
        scale = length / (_norm([x for part in aside for x in part]) or 1.0)
        for share, part in zip(first.shares, aside, strict=True):
            share.g1 = [x * scale for x in part]
        try:
            with super()._perturbed(first, distance):
                yield
        finally:
            for share, g1 in zip(first.shares, gradients, strict=True):
                share.g1 = g1
        if distance == WHOLE:  # the last point of a step
            self._before = [[x.clone() for x in g1] for g1 in gradients]

    def _aside(self, gradients: list[list[torch.Tensor]]) -> list[list[torch.Tensor]]:
        """The same at every point of a step; random numbers of its own leave those of the training as they are."""
        if self._direction == "random":
            draw = torch.Generator().manual_seed(self.step_count)
            return [[torch.randn(x.shape, generator=draw, dtype=x.dtype) for x in g1] for g1 in gradients]
        return gradients if self._before is None else self._before


def _norm(tensors: list[torch.Tensor]) -> float:
    return sum(float(tensor.square().sum()) for tensor in tensors) ** 0.5


def _regularized(name: str, strengths: tuple[float, ...], **settings: Any) -> list[Arm]:
    return [Arm(f"{name}-{strength:g}", {"strength": strength, **settings}) for strength in strengths]


STRENGTHS = (0.3, 1.0, 3.0, 10.0)

RATES = (1.0, 0.5, 0.25, 0.125)
"""Factors on the learning rate, among which each family is tuned once its setting at rate 1 is chosen."""

FAMILIES: dict[str, list[Arm]] = {
    PLAIN: [Arm("none")],
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


def at_rate(arm: Arm, rate: float) -> Arm:
    """The arm at a part of the learning rate."""
    name = arm.name if rate == 1 else f"rate-{rate:g}" if arm.name == PLAIN else f"{arm.name}-rate-{rate:g}"
    return replace(arm, name=name, rate=rate)


def ablations(chosen: Arm) -> dict[str, Arm]:
    """What of a regularized arm does the work? Each differs from ``chosen`` in one thing, and is not tuned.

    The last three are what the published system does to bf16 weights: θ' written on their grid, at its ε; plain training
    of such weights; and plain training whose float32 weights are replaced by bf16 ones at every step, without any penalty.
    """

    def other(name: str, **settings: Any) -> Arm:
        return Arm(f"{chosen.name}-{name}", {**chosen.wrapper, **settings})

    published = {"eps": 1e-3, "rounding": "nearest"}
    return {
        "random direction": replace(chosen, name=f"{chosen.name}-random", direction="random"),
        "previous gradient": replace(chosen, name=f"{chosen.name}-previous", direction="previous"),
        "SAM (γ = ε)": other("sam", eps=chosen.wrapper["strength"]),
        "embeddings and head too": other("all", exclude="none"),
        "penalty at most ‖g1‖": other("bounded", max_penalty_ratio=1.0),
        "bf16, θ' on the grid": replace(other("bf16", **published), weights="bfloat16"),
        "bf16, no penalty": Arm(f"{PLAIN}-bf16", weights="bfloat16"),
        "rounded masters, no penalty": Arm(f"{PLAIN}-rounded", weights="rounded"),
    }


def named(name: str) -> Arm:
    """The setting of that name: of a family, at a part of the rate, or an ablation of the former.

    Raises:
        ValueError: there is none.
    """
    settings = [arm for grid in FAMILIES.values() for arm in grid]
    known = {other.name: other for arm in settings for other in (at_rate(arm, rate) for rate in RATES)}
    known |= {other.name: other for arm in settings if "eps" in arm.wrapper for other in ablations(arm).values()}
    if name not in known:
        raise ValueError(f"--arms {name}: must be among {', '.join(known)}")
    return known[name]


SMALL = (PLAIN, "gr-sequence-1-rate-0.5")
"""The small study: the plain run against the setting that the full one chose."""
