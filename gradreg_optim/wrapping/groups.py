"""What a parameter group knows about its regularization: the ``gradreg_*`` keys beside ``lr`` and ``weight_decay``.

Living there, hyperparameters are saved with the optimizer, can differ between groups and can be scheduled. ``strength``,
``eps`` and ``radius`` are read group by group; the other settings and the step count hold for the whole optimizer, are
written to every group and read from the first. ``gradreg_excluded`` lists positions in ``group["params"]``: positions
survive FSDP2 and tensor parallelism, which put other tensors there. ``gradreg_floor`` is the noise floor last measured, and
``gradreg_auto_radius`` the radius of the next step, where it finds itself; both are ``None`` until there is one.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from gradreg_optim.core.exact import exact
from gradreg_optim.core.finite_difference import CENTRAL, FORWARD
from gradreg_optim.core.plan import Plan
from gradreg_optim.core.radius import AUTO
from gradreg_optim.wrapping.settings import (
    DEFAULT_EPS,
    PER_GROUP,
    SETTINGS,
    SHARED,
    Default,
    check_settings,
    plain,
    suggestion,
)

Group = dict[str, Any]

SETTING_KEYS = tuple(f"gradreg_{name}" for name in (*PER_GROUP, *SHARED))
KEYS = (*SETTING_KEYS, "gradreg_step", "gradreg_floor", "gradreg_auto_radius", "gradreg_excluded")
DELETED = ("gradreg_memory", "gradreg_between", "gradreg_along")
"""Keys that checkpoints of earlier versions hold."""


def missing_keys(group: Group) -> list[str]:
    """The ``gradreg_*`` keys that ``group`` lacks."""
    return [key for key in KEYS if key not in group and key not in ("gradreg_excluded", "gradreg_auto_radius")]


def drop_keys(group: Group, keys: Iterable[str]) -> None:
    """Remove those of ``keys`` that ``group`` has."""
    for key in keys:
        group.pop(key, None)


def check_keys(group: Group) -> None:
    """Raise ``ValueError`` for a ``gradreg_*`` key that is not one: it would have no effect."""
    for key in group:
        if key.startswith(("gradreg_", "grad_reg_")) and key not in KEYS and key not in DELETED:
            meant = suggestion(key, (*PER_GROUP, *SHARED), prefix="gradreg_")
            raise ValueError(f"{key!r} in a parameter group: no setting has that name, so it would have no effect. {meant}")


def check_brought(group: Group, first: Group) -> None:
    """Raise ``ValueError`` for keys that ``group`` brings and that would have no effect, and for values that break rules."""
    check_keys(group)
    check_settings(**{key.removeprefix("gradreg_"): group[key] for key in SETTING_KEYS if group.get(key) is not None})
    for name in SHARED:
        key = f"gradreg_{name}"
        if key in group and plain(group[key]) != plain(first.get(key, group[key])):
            raise ValueError(
                f"{key}={group[key]!r} in one parameter group and {first[key]!r} in the first: it holds for the whole "
                f"optimizer. Give it to the optimizer; groups may differ in {', '.join(PER_GROUP)}."
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
    if values["radius"] is not None:
        values["eps"] = None
    elif isinstance(values["eps"], Default):  # nothing is given: in low precision the radius finds itself
        values["radius"] = AUTO
    # A checkpoint holds plain numbers: no type of this package, as the defaults have, and none of NumPy.
    values = {name: value if value is None or value == AUTO else float(value) for name, value in values.items()}
    group.update({f"gradreg_{name}": value for name, value in values.items()})
    for name in SHARED:
        group.setdefault(f"gradreg_{name}", settings[name])
    group.setdefault("gradreg_step", step)
    group.setdefault("gradreg_floor", None)
    group.setdefault("gradreg_auto_radius", None)


def warn_of_replaced(groups: list[Group], before: list[Group], settings: dict[str, Any]) -> None:
    """Say which of the ``settings`` that were given, not left at their defaults, a loaded state has replaced."""
    given = [(s.name, f"gradreg_{s.name}") for s in SETTINGS if s.is_key and s.is_given(settings[s.name])]
    replaced = {
        f"{name}={own[key]!r} by {group[key]!r}": None
        for group, own in zip(groups, before, strict=True)
        for name, key in given
        if key in group and group[key] != own[key]
    }
    if replaced:
        warnings.warn(
            f"The loaded optimizer state replaces {', '.join(replaced)}: settings come from the checkpoint, as the learning "
            "rate does. To train with others, write them into the gradreg_* keys of param_groups after loading.",
            stacklevel=3,
        )


def check_group(group: Group) -> None:
    """Raise ``ValueError`` if the settings a user or a scheduler wrote into ``group`` since break their rules."""
    check_keys(group)
    group.update({key: plain(group[key]) for key in SETTING_KEYS})
    radius = {"radius": None} if is_set_by_eps(group) else {}
    check_settings(**{key.removeprefix("gradreg_"): group[key] for key in SETTING_KEYS} | radius)
    if group["gradreg_eps"] is None and group["gradreg_radius"] is None:
        raise ValueError(
            "gradreg_eps=None and gradreg_radius=None: one of them must set the length of the step. "
            "Write a number into group['gradreg_eps'] or group['gradreg_radius']."
        )


def is_set_by_eps(group: Group) -> bool:
    """Whether an ``eps`` that was written into the group since has taken the place of the default radius."""
    return group["gradreg_radius"] == AUTO and group["gradreg_eps"] not in (None, DEFAULT_EPS)


def settled_plan(groups: list[Group], excluded: list[list[int]], model: nn.Module | None) -> Plan:
    """Validate all settings; the plan of every step until one changes, but for what depends on the number of the step."""
    for group in groups:
        check_group(group)
    shared = groups[0]
    return Plan(
        step=0,
        strengths=tuple(group["gradreg_strength"] for group in groups),
        excluded=tuple(map(frozenset, excluded)),
        eps=tuple(group["gradreg_eps"] for group in groups),
        radius=tuple(None if is_set_by_eps(group) else group["gradreg_radius"] for group in groups),
        g1_clip=shared["gradreg_g1_clip"],
        g2_clip=shared["gradreg_g2_clip"],
        max_penalty_ratio=shared["gradreg_max_penalty_ratio"],
        scheme={"forward": FORWARD, "central": CENTRAL}.get(shared["gradreg_method"]) or exact(model),
        points=(),
        rounds_to_nearest=shared["gradreg_rounding"] == "nearest",
        shrinks=shared["gradreg_shrink"],
        fraction=shared["gradreg_fraction"],
        floor=None,
        is_always_auto=any(group["gradreg_radius"] == AUTO and group["gradreg_eps"] is None for group in groups),
    )


def parameter_names(groups: Iterable[Group], model: nn.Module | None) -> dict[int, list[str]]:
    """Every name of every parameter, by ``id``: from the model, or from an optimizer built on named parameters.

    A tied parameter has several names. Empty if neither source has any.
    """
    names: dict[int, list[str]] = {}
    if model is not None:
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
    else:
        for group in groups:
            for name, parameter in zip(group.get("param_names", ()), group["params"], strict=False):
                names.setdefault(id(parameter), []).append(name)
    return names


def excluded_positions(
    groups: list[Group], patterns: tuple[str, ...], model: nn.Module | None, *, must_match: bool = True
) -> list[list[int]]:
    """For each group the positions of the parameters whose names contain one of ``patterns``.

    Raises:
        ValueError: there are patterns but no names, or a pattern is part of no name.
    """
    if not patterns:
        return [[] for _ in groups]
    names = parameter_names(groups, model)
    if not names:
        raise ValueError(
            f"exclude={patterns!r}: parameter names are not known. Pass model=<the module>, or build the optimizer on "
            "model.named_parameters()."
        )
    known = [name for group in groups for parameter in group["params"] for name in names.get(id(parameter), ())]
    for pattern in patterns:
        if must_match and not any(pattern in name for name in known):
            raise ValueError(
                f"exclude={patterns!r}: {pattern!r} is part of no parameter name, and a pattern has to match. "
                f"Names look like {', '.join(map(repr, known[:3]))}."
            )

    def matches(parameter: Tensor) -> bool:
        return any(pattern in name for name in names.get(id(parameter), ()) for pattern in patterns)

    return [[i for i, parameter in enumerate(group["params"]) if matches(parameter)] for group in groups]


def positions_of(parameters: Iterable[Tensor], groups: Iterable[Group]) -> list[list[int]]:
    """For each group the positions of those of ``parameters`` that it has."""
    wanted = {id(parameter) for parameter in parameters}
    return [[i for i, parameter in enumerate(group["params"]) if id(parameter) in wanted] for group in groups]


def is_state_initialization(optimizer: Optimizer) -> bool:
    """Whether this is torch.distributed.checkpoint creating state: no state yet, rates of 0, gradients of 0."""
    groups = optimizer.param_groups
    return (
        not optimizer.state
        and all(float(group.get("lr", 0.0)) == 0.0 for group in groups)
        and not any(p.grad is not None and bool(p.grad.any()) for group in groups for p in group["params"])
    )
