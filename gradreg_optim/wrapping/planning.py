"""The plan of a step, from the settings in the parameter groups."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gradreg_optim.core.plan import START, Plan
from gradreg_optim.core.precision import AUTO, DEFAULT_CHECK_EVERY
from gradreg_optim.core.schemes import CENTRAL, FORWARD
from gradreg_optim.core.storage import Storage
from gradreg_optim.wrapping.groups import SETTING_KEYS, Group, check_group
from gradreg_optim.wrapping.schedule import Schedule, strength_factor


class Planner:
    """Plans the steps of one optimizer. Settings are validated when one has changed."""

    def __init__(self) -> None:
        self._settled: tuple[list[list[Any]], Plan] | None = None

    def __call__(self, groups: list[Group], excluded: list[list[int]], schedule: Schedule | None, storage: Storage) -> Plan:
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
        is_low = True if storage.has_low_precision else group.get("gradreg_is_low")
        radius = group.get("gradreg_auto_radius")
        return replace(
            plan,
            step=step,
            points=plan.scheme.checked_points if _check_is_due(group, step, is_low) else plan.scheme.points,
            is_low=is_low,
            floor=group.get("gradreg_floor"),
            auto_radius=START if radius is None else radius,
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
        strengths=tuple(group["gradreg_strength"] for group in groups),
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

    Of ``gradreg_every`` steps in a row one is regularized: it is checked if a multiple of ``check_every`` falls within.
    """
    every = group["gradreg_check_every"]
    if every == 0:
        return False
    if group.get("gradreg_floor") is None:
        return True
    if every is None:  # where precision is low, or the radius adapts
        every = DEFAULT_CHECK_EVERY if is_low or group["gradreg_radius"] == AUTO else 0
    return bool(every) and step % every < group["gradreg_every"]
