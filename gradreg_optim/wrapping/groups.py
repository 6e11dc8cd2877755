"""The ``gradreg_*`` keys of parameter groups, beside ``lr``, and the plan of a step made from them.

Living there, hyperparameters are saved with the optimizer, can differ between groups and can be scheduled.
``strength``, ``eps`` and ``radius`` are read group by group; the other settings and the step count hold for
the whole optimizer, are written to every group and read from the first. ``gradreg_excluded`` lists positions
in ``group["params"]``: positions survive FSDP2 and tensor parallelism, which put other tensors there. Some
keys keep what steps found out, ``None`` until one has: ``gradreg_is_low`` whether the passes have fewer bits
than float32, ``gradreg_floor`` the noise floor last measured, ``gradreg_auto_radius`` the radius of the next
step, where it adapts, and, where γ is being found, ``gradreg_ratio_total`` and ``gradreg_ratio_count``
(:class:`~gradreg_optim.core.plan.Settling`) after ``gradreg_auto_steps`` steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch.optim import Optimizer

from gradreg_optim.core.plan import START, Plan, Settling
from gradreg_optim.core.precision import AUTO, DEFAULT_CHECK_EVERY, PUBLISHED_EPS
from gradreg_optim.core.replicas import Replicas
from gradreg_optim.core.schemes import CENTRAL, FORWARD, stack_scalars
from gradreg_optim.core.strength import STEPS, strength_so_far
from gradreg_optim.wrapping.schedule import Schedule, strength_factor
from gradreg_optim.wrapping.settings import (
    DELETED,
    PER_GROUP,
    SETTINGS,
    SHARED,
    check_names,
    check_settings,
    plain,
    say,
    suggestion,
)

Group = dict[str, Any]

SETTING_KEYS = tuple(f"gradreg_{name}" for name in (*PER_GROUP, *SHARED))
FOUND_KEYS = (
    "gradreg_is_low", "gradreg_floor", "gradreg_auto_radius", "gradreg_ratio_total", "gradreg_ratio_count",
    "gradreg_auto_steps",
)  # fmt: skip
KEYS = (*SETTING_KEYS, "gradreg_step", *FOUND_KEYS, "gradreg_excluded")
DELETED_KEYS = tuple(f"gradreg_{name}" for name in DELETED)
"""Keys that checkpoints of earlier versions hold."""


def missing_keys(group: Group) -> list[str]:
    """The ``gradreg_*`` keys that ``group`` lacks."""
    return [key for key in KEYS if key not in group and key not in ("gradreg_excluded", *FOUND_KEYS)]


def drop_keys(group: Group, keys: Iterable[str]) -> None:
    """Remove those of ``keys`` that ``group`` has."""
    for key in keys:
        group.pop(key, None)


def check_keys(group: Group) -> None:
    """Raise ``ValueError`` for a ``gradreg_*`` key that is not one: it would have no effect."""
    for key in group:
        if key in DELETED_KEYS and "gradreg_step" not in group:  # else it comes from a checkpoint
            check_names("a parameter group", [key.removeprefix("gradreg_")])
        if key.startswith(("gradreg_", "grad_reg_")) and key not in KEYS and key not in DELETED_KEYS:
            meant = suggestion(key, (*PER_GROUP, *SHARED), prefix="gradreg_")
            raise ValueError(
                f"{key!r} in a parameter group: no setting has that name, so it would have no effect. {meant}"
            )


def check_brought(group: Group, first: Group) -> None:
    """Raise ``ValueError`` if ``group`` brings keys that have no effect or values that break their rules."""
    check_keys(group)
    check_settings(
        **{key.removeprefix("gradreg_"): group[key] for key in SETTING_KEYS if group.get(key) is not None}
    )
    for name in SHARED:
        key = f"gradreg_{name}"
        if key in group and plain(group[key]) != plain(first.get(key, group[key])):
            raise ValueError(
                f"{key}={group[key]!r} in one parameter group and {first[key]!r} in the first: it holds for "
                "the whole optimizer. Give it to the optimizer; groups may differ in "
                f"{', '.join(PER_GROUP)}."
            )


def adopt_group(group: Group, settings: dict[str, Any], *, step: int) -> None:
    """Fill in every ``gradreg_*`` key that ``group`` does not bring itself.

    A group that brings ``gradreg_eps`` does not inherit a radius, and one with ``gradreg_radius`` no eps.
    """
    check_brought(group, group)
    own = {name: group[f"gradreg_{name}"] for name in PER_GROUP if group.get(f"gradreg_{name}") is not None}
    values = {name: settings[name] for name in PER_GROUP}
    if "radius" in own or "eps" in own:
        values["eps"] = values["radius"] = None
    values |= own
    # A checkpoint holds plain numbers, none of NumPy.
    values = {
        name: value if value is None or value == AUTO else float(value) for name, value in values.items()
    }
    group.update({f"gradreg_{name}": value for name, value in values.items()})
    for name in SHARED:
        group.setdefault(f"gradreg_{name}", settings[name])
    group.setdefault("gradreg_step", step)
    for key in FOUND_KEYS:
        group.setdefault(key, None)


def modernize(group: Group) -> None:
    """Bring the keys of a checkpoint of an earlier version up to date."""
    drop_keys(group, DELETED_KEYS)
    # "auto" was a default beside ε.
    if group.get("gradreg_radius") == AUTO and group.get("gradreg_eps") is not None:
        group["gradreg_eps"] = None if group["gradreg_eps"] == PUBLISHED_EPS else group["gradreg_eps"]
        group["gradreg_radius"] = None
    if group.get("gradreg_method") == "exact":
        group["gradreg_method"] = "central"


def warn_of_replaced(groups: list[Group], before: list[Group], settings: dict[str, Any]) -> None:
    """Warn of explicitly given ``settings``, other than the defaults, that a loaded state has replaced."""
    given = [(s.name, f"gradreg_{s.name}") for s in SETTINGS if s.is_key and settings[s.name] != s.default]
    replaced = {
        f"{name}={own[key]!r} by {group[key]!r}": None
        for group, own in zip(groups, before, strict=True)
        for name, key in given
        if key in group and group[key] != own[key]
    }
    if replaced:
        warnings.warn(
            f"The loaded optimizer state replaces {', '.join(replaced)}: settings come from the checkpoint, "
            "as the learning rate does. To train with others, write them into the gradreg_* keys of "
            "param_groups after loading.",
            stacklevel=3,
        )


def check_group(group: Group) -> None:
    """Raise ``ValueError`` if settings that a user or a scheduler wrote into ``group`` break their rules."""
    check_keys(group)
    group.update({key: plain(group[key]) for key in SETTING_KEYS})
    check_settings(**{key.removeprefix("gradreg_"): group[key] for key in SETTING_KEYS})


def settle_groups(groups: list[Group]) -> None:
    """Count a step that finds γ; after the last one write it into the groups that ask for it. Waits there."""
    first = groups[0]
    first["gradreg_auto_steps"] = steps = (first["gradreg_auto_steps"] or 0) + 1
    if steps < STEPS or first["gradreg_ratio_total"] is None:
        return
    total, count = float(first["gradreg_ratio_total"]), float(first["gradreg_ratio_count"])
    strength = float(strength_so_far(Settling((), total, count)))
    for group in groups if strength else []:
        if group["gradreg_strength"] == AUTO:
            group["gradreg_strength"] = strength
    if strength:
        say(
            f"Gradient regularization: strength settled at γ = {strength:.4g} after {steps} regularized "
            f"steps. To keep it in later runs pass strength={strength:.3g}; for micro-batches of k times as "
            "many samples pass k times as much."
        )


def agree(groups: list[Group], replicas: Replicas, *, is_read: bool) -> None:
    """Give all ranks the mean of what they have found from gradients of their own.

    ``is_read``: it may be numbers that were not known before; reading them waits.
    """
    keys = FOUND_KEYS[:3]
    found = [groups[0][key] for key in keys]
    if not (is_read or found[2] is not None):
        return
    numbers = [*(value or 0.0 for value in found), *(float(value is not None) for value in found)]
    sums, counts = replicas.sum(stack_scalars(numbers)).view(2, -1)
    means: list[Any] = list((sums / counts.clamp(min=1)).unbind())
    if is_read:
        means = [mean if count else None for mean, count in zip(means, counts.tolist(), strict=True)]
        is_low, floor = (None if mean is None else float(mean) for mean in means[:2])
        found[:2] = [None if is_low is None else is_low > 0, floor]
    for group in groups:
        group.update(zip(keys, [*found[:2], means[2]], strict=True))


def is_state_initialization(optimizer: Optimizer) -> bool:
    """Whether torch.distributed.checkpoint is creating state: there is none; rates and gradients are 0."""
    groups = optimizer.param_groups
    return (
        not optimizer.state
        and all(float(group.get("lr", 0.0)) == 0.0 for group in groups)
        and not any(p.grad is not None and bool(p.grad.any()) for group in groups for p in group["params"])
    )


class Planner:
    """Plans the steps of one optimizer. Settings are validated when one has changed."""

    def __init__(self) -> None:
        self._settled: tuple[list[list[Any]], Plan] | None = None

    def __call__(self, groups: list[Group], excluded: list[list[int]], schedule: Schedule | None) -> Plan:
        """The plan of the step to come."""
        plan, group, step = self.settled(groups, excluded), groups[0], int(groups[0].get("gradreg_step", 0))
        if group["gradreg_warmup_steps"] or group["gradreg_schedule"] or schedule:
            factor = strength_factor(
                step,
                warmup_steps=group["gradreg_warmup_steps"],
                schedule=schedule or group["gradreg_schedule"],
                schedule_steps=group["gradreg_schedule_steps"],
            )
            plan = replace(plan, strengths=tuple(strength * factor for strength in plan.strengths))
        since_warmup = step - group["gradreg_warmup_steps"]
        if not any(plan.strengths) or since_warmup % group["gradreg_every"]:
            return replace(plan, step=step, points=())
        is_low, radius = group.get("gradreg_is_low"), group.get("gradreg_auto_radius")
        found = {name: group.get(f"gradreg_ratio_{name}") for name in ("total", "count")}
        known: dict[str, Any] = {name: value for name, value in found.items() if value is not None}
        is_auto = tuple(of["gradreg_strength"] == AUTO for of in groups)
        return replace(
            plan,
            step=step,
            points=plan.scheme.checked_points if _check_is_due(group, step, is_low) else plan.scheme.points,
            is_low=is_low,
            floor=group.get("gradreg_floor"),
            auto_radius=START if radius is None else radius,
            settling=Settling(is_auto, **known) if any(is_auto) else None,
        )

    def settled(self, groups: list[Group], excluded: list[list[int]]) -> Plan:
        """What of the plan stays the same until a setting changes."""
        pairs = zip(groups, excluded, strict=True)
        now = [[len(group), *(group.get(key) for key in SETTING_KEYS), *where] for group, where in pairs]
        if self._settled is None or self._settled[0] != now:
            self._settled = now, _settled_plan(groups, excluded)
        return self._settled[1]


def _settled_plan(groups: list[Group], excluded: list[list[int]]) -> Plan:
    for group in groups:
        check_group(group)
    shared = groups[0]
    return Plan(
        step=0,
        strengths=tuple(
            1.0 if group["gradreg_strength"] == AUTO else group["gradreg_strength"] for group in groups
        ),
        excluded=tuple(map(frozenset, excluded)),
        eps=tuple(group["gradreg_eps"] for group in groups),
        radius=tuple(group["gradreg_radius"] for group in groups),
        g1_clip=shared["gradreg_g1_clip"],
        g2_clip=shared["gradreg_g2_clip"],
        max_penalty_ratio=shared["gradreg_max_penalty_ratio"],
        scheme={"forward": FORWARD, "central": CENTRAL}[shared["gradreg_method"]],
        points=(),
        rounds_to_nearest=shared["gradreg_rounding"] == "nearest",
        shrinks=shared["gradreg_shrink"],
        is_check_asked=shared["gradreg_check_every"] is not None,
    )


def _check_is_due(group: Group, step: int, is_low: bool | None) -> bool:
    """Whether a check falls on this step: in the first regularized one, then every ``check_every`` steps.

    One of ``gradreg_every`` consecutive steps is regularized. It is checked if a multiple of ``check_every``
    falls within these steps.
    """
    every = group["gradreg_check_every"]
    if every == 0:
        return False
    if group.get("gradreg_floor") is None:
        return True
    if every is None:  # where precision is low, or the radius adapts
        every = DEFAULT_CHECK_EVERY if is_low or group["gradreg_radius"] == AUTO else 0
    return bool(every) and step % every < group["gradreg_every"]
