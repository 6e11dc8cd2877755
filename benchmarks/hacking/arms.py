"""The arms of the study: ways to keep the policy from hacking its reward, and the plain run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from gradreg_optim import GradRegOptimizer

Run = dict[str, Any]
"""The arm, the seed, the curve of measurements, and the seconds of a step without measuring."""
Runs = dict[str, list[Run]]
"""By arm or family."""
PUBLISHED_NORM = {"norm_of": "step", "resample": "reuse"}
"""Of the whole step, with the completions as they are: what published arms have unless they say otherwise."""
UNNOTICED = {"strength": 1e-12, **PUBLISHED_NORM}
"""A penalty that float32 rounds to nothing. The training is plain, and the wrapper logs its figures."""

EPS, RADIUS = 1e-2, 0.03
"""The step to the second gradient. ‖g1‖ is near 0.3 here, so RADIUS is a ten times longer step than EPS."""

PLAIN = "none"
"""The family of the unregularized run."""
LOWER = "lower rate"
"""The family of the plain run with a tuned learning rate."""
STOPPED = "early stopping"
"""The family that is computed from the runs of PLAIN."""


@dataclass(frozen=True)
class Arm:
    """Settings of one arm.

    Args:
        name: the names of its runs' files begin with it.
        wrapper: settings of the wrapper. None at all: the defaults, as ``attach(trainer)`` has them.
        trainer: settings of GRPOConfig.
        rate: a factor on the learning rate.
        weights: "float32"; "bfloat16", without fp32 masters; or "rounded", float32 weights that every step
            rounds to bfloat16.
        micro_batch: the answers of a micro-batch; 0: those of the step.
    """

    name: str
    wrapper: dict[str, Any] = field(default_factory=lambda: dict(UNNOTICED))
    trainer: dict[str, Any] = field(default_factory=dict)
    rate: float = 1.0
    weights: str = "float32"
    micro_batch: int = 0

    def prepared(self, policy: nn.Module) -> nn.Module:
        """The policy with its weights in the form that this arm keeps."""
        if self.weights == "rounded":
            round_(policy.parameters())
        return policy.to(torch.bfloat16) if self.weights == "bfloat16" else policy

    def optimizer(self, base: torch.optim.Optimizer, **settings: Any) -> torch.optim.Optimizer:
        """The wrapper of this arm around ``base``; ``base``, if nothing is chosen."""
        if self.weights == "rounded":
            base.register_step_post_hook(
                lambda stepped, *_: round_(p for g in stepped.param_groups for p in g["params"])
            )
        return GradRegOptimizer(base, **{**settings, **self.wrapper}) if self.wrapper else base


@torch.no_grad()
def round_(parameters: Iterable[torch.Tensor]) -> None:
    """Round to bfloat16 numbers in place, as copying bf16 weights over their fp32 masters does."""
    for parameter in parameters:
        parameter.copy_(parameter.to(torch.bfloat16))


def _regularized(name: str, strengths: tuple[float, ...], **settings: Any) -> list[Arm]:
    given = PUBLISHED_NORM | settings
    return [Arm(f"{name}-{strength:g}", {"strength": strength, **given}) for strength in strengths]


STRENGTHS = (0.3, 1.0, 3.0, 10.0)

RATES = (1.0, 0.5, 0.25, 0.125)
"""Factors on the learning rate. Each family is tuned over them after its setting at rate 1 is chosen."""

FAMILIES: dict[str, list[Arm]] = {
    PLAIN: [Arm("none")],
    "KL penalty": [Arm(f"kl-{beta:g}", trainer={"beta": beta}) for beta in (0.03, 0.1, 0.3, 1.0)],
    "reference resets": [
        Arm(
            f"resets-{beta:g}-{every}",
            trainer={
                "beta": beta,
                "sync_ref_model": True,
                "ref_model_mixup_alpha": 1.0,
                "ref_model_sync_steps": every,
            },
        )
        for beta, every in ((0.1, 40), (0.1, 20), (0.3, 40), (0.3, 20))
    ],
    "GR eps": _regularized("gr-eps", STRENGTHS, eps=EPS),
    "GR radius": _regularized("gr-radius", STRENGTHS, radius=RADIUS),
    "GR sequence": _regularized("gr-sequence", STRENGTHS, eps=EPS, resample="sequence"),
}
"""The settings over which each family is tuned: four, and one of the plain run."""


def at_rate(arm: Arm, rate: float) -> Arm:
    """The arm with a factor on the learning rate."""
    name = arm.name if rate == 1 else f"rate-{rate:g}" if arm.name == PLAIN else f"{arm.name}-rate-{rate:g}"
    return replace(arm, name=name, rate=rate)


def ablations(chosen: Arm) -> dict[str, Arm]:
    """Which part of a regularized arm has the effect? Each ablation differs from ``chosen`` in one setting
    and is not tuned.

    The last three reproduce what the published system does to bf16 weights: θ' rounded to nearest, at the
    published ε; plain training of bf16 weights; and plain training whose float32 weights are rounded to bf16
    after every step.
    """

    def other(name: str, **settings: Any) -> Arm:
        return Arm(f"{chosen.name}-{name}", {**chosen.wrapper, **settings})

    published = {"eps": 1e-3, "rounding": "nearest"}
    return {
        "SAM (γ = ε)": other("sam", eps=chosen.wrapper["strength"]),
        "embeddings and head too": other("all", exclude="none"),
        "penalty at most ‖g1‖": other("bounded", max_penalty_ratio=1.0),
        "bf16, θ' on the grid": replace(other("bf16", **published), weights="bfloat16"),
        "bf16, no penalty": Arm(f"{PLAIN}-bf16", weights="bfloat16"),
        "rounded masters, no penalty": Arm(f"{PLAIN}-rounded", weights="rounded"),
    }


def named(name: str) -> Arm:
    """The setting of that name: one of a family, the same with a factor on the rate, or an ablation of one.

    Raises:
        ValueError: there is no such setting.
    """
    settings = [arm for grid in FAMILIES.values() for arm in grid]
    known = {other.name: other for arm in settings for other in (at_rate(arm, rate) for rate in RATES)}
    known |= {arm.name: arm for arm in (WHOLE, *MICRO_BATCHES)}
    regularized = [arm for arm in settings if "eps" in arm.wrapper]
    known |= {other.name: other for arm in regularized for other in ablations(arm).values()}
    if name not in known:
        raise ValueError(f"--arms {name}: must be among {', '.join(known)}")
    return known[name]


MICRO_BATCH = 64
"""The answers of a micro-batch, unless an arm says otherwise."""


def nothing_chosen(*, beta: float = 0.0, micro_batch: int = MICRO_BATCH) -> Arm:
    """GR as ``attach(trainer)`` has it, alone or on top of a KL penalty."""
    names = [f"kl-{beta:g}"] * bool(beta) + ["default"]
    name = _of_size("-".join(names), micro_batch)
    return Arm(name, {}, {"beta": beta} if beta else {}, micro_batch=micro_batch)


def micro_batches(strength: float, micro_batch: int = MICRO_BATCH) -> Arm:
    """GR of micro-batches with a strength and the step that the whole one has in the other arms."""
    settings = {"strength": strength, "eps": EPS, "norm_of": "micro_batch", "resample": "sequence"}
    return Arm(_of_size(f"gr-micro-{strength:g}", micro_batch), settings, micro_batch=micro_batch)


def _of_size(name: str, micro_batch: int) -> str:
    return name if micro_batch == MICRO_BATCH else f"{name}-m{micro_batch}"


WHOLE = Arm("gr-step-auto", {"strength": "auto", "norm_of": "step", "resample": "sequence"})
"""As where nothing is chosen, but of the whole step."""
MICRO_BATCHES = [
    arm
    for size in (MICRO_BATCH, 16, 8)
    for arm in (nothing_chosen(micro_batch=size), *(micro_batches(strength, size) for strength in STRENGTHS))
]

CASE = {
    PLAIN: Arm(PLAIN),
    "KL penalty": named("kl-0.3-rate-0.5"),
    "GR of the step": named("gr-sequence-0.3"),
    "GR of micro-batches": micro_batches(0.3),
    "nothing chosen": nothing_chosen(),
}
"""What the small study compares; the KL penalty was tuned for it, the strength 0.3 for 64 answers a step."""
