"""The outside of the wrapper: one real ``torch.optim.Optimizer`` that shares everything with the one inside.

LR schedulers, Accelerate, GradScaler and checkpointing all hold on to ``param_groups``, ``state`` and ``defaults``; here
these are the wrapped optimizer's own objects, so that there is nothing to keep in step.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from gradreg_optim.core.losses import Losses
from gradreg_optim.core.plan import Plan
from gradreg_optim.core.radius import START
from gradreg_optim.core.self_check import DEFAULT_CHECK_EVERY
from gradreg_optim.core.step import Outcome
from gradreg_optim.core.storage import Storage
from gradreg_optim.wrapping import upwards
from gradreg_optim.wrapping.engines import EngineCheck
from gradreg_optim.wrapping.groups import (
    DELETED,
    KEYS,
    SETTING_KEYS,
    adopt_group,
    check_brought,
    drop_keys,
    excluded_positions,
    is_state_initialization,
    missing_keys,
    positions_of,
    settled_plan,
    warn_of_replaced,
)
from gradreg_optim.wrapping.hooks import BRIEFLY, brief, run_hooks_around, shared, without_global_hooks
from gradreg_optim.wrapping.refusals import check_arguments, check_wrappable
from gradreg_optim.wrapping.schedule import strength_factor
from gradreg_optim.wrapping.settings import PLACES, SHARED, check_settings, exclude_patterns

NOTHING = ("none",)
"""The value of ``exclude`` that leaves nothing out, not even where a default would."""


class OptimizerWrapper(Optimizer):
    """Delegation, hyperparameters in the groups, checkpoints and pickling; what a step does is left to the subclass."""

    profile_hook_step = staticmethod(run_hooks_around)  # type: ignore[assignment]
    _is_state_initialization = is_state_initialization
    _step_supports_amp_closure = True  # Composer's trainer (0.32) asks in fp16, and then unscales in the closure
    _losses: Losses
    _default_exclusion: Callable[[], Iterable[Tensor]] | None = None  # a trainer's, for groups added later

    def __init__(
        self,
        optimizer: Optimizer,
        settings: dict[str, Any],
        *,
        exclude: str | Iterable[str],
        model: nn.Module | None,
        scaler: Any = None,
        named_groups: Callable[[], list[dict[str, Any]]] | None = None,
    ) -> None:
        # named_groups: groups of the model's parameters, if those of ``optimizer`` hold something else.
        check_wrappable(optimizer)
        if isinstance(optimizer, OptimizerWrapper):
            raise ValueError(
                "optimizer is a GradRegOptimizer already: one wrapper regularizes. Pass the optimizer inside it."
            )
        check_arguments(model, scaler)
        check_settings(**settings)
        self.optimizer = optimizer
        self._settings = settings
        self._schedule = settings["schedule"] if callable(settings["schedule"]) else None
        if self._schedule is not None:
            self._settings = {**settings, "schedule": None}  # like LambdaLR's, a callable is not saved
        self._model, self._scaler = model, scaler
        self._attachment: Any = None
        self._is_in_step = False
        self.exclude = exclude_patterns(exclude)
        self.__setstate__({})  # Optimizer's step hooks, without Optimizer.__init__, which would build groups of its own
        self._named_groups = named_groups
        positions = excluded_positions(self._groups_with_names(), self._patterns(), model)
        for group in self.param_groups:
            if "gradreg_step" in group:  # wrapped before, or loaded from a checkpoint: these settings count, and its step
                drop_keys(group, SETTING_KEYS)
            check_brought(group, {**{f"gradreg_{name}": self._settings[name] for name in SHARED}, **self.param_groups[0]})
        for group in self.param_groups:
            adopt_group(group, self._settings, step=0)
        self._excluded = positions  # also in the groups, where loading a checkpoint may put those of another model
        self._settled = self._settle()
        self._check_engine = EngineCheck()
        upwards.announce()

    # One optimizer: groups, state and defaults are the wrapped one's.

    param_groups = shared("param_groups")
    state = shared("state")
    defaults = shared("defaults")

    def __getattr__(self, name: str) -> Any:
        """Public attributes of the wrapped optimizer, such as the ``eval`` of schedule-free ones."""
        # Private ones stay out: GradScaler would take a fused optimizer's flag for a promise of the wrapper.
        if name.startswith("_") or "optimizer" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.optimizer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute, which a setting is not."""
        if name in PLACES:
            raise AttributeError(f"optimizer.{name} = … would have no effect. {PLACES[name]}")
        super().__setattr__(name, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch; it may bring ``gradreg_*`` keys and inherits the others."""
        if isinstance(param_group, dict):  # torch names what is none
            check_brought(param_group, self.param_groups[0])
        self.optimizer.add_param_group(param_group)
        self._adopt_new_groups()

    def _adopt_new_groups(self) -> None:
        """Complete groups that came without ``gradreg_*`` keys, as after ``add_param_group`` on the wrapped optimizer."""
        groups = self.param_groups
        if len(groups) > len(self._excluded):
            positions = excluded_positions(self._groups_with_names(), self._patterns(), self._model, must_match=False)
            by_default = positions_of(self._default_exclusion() if self._default_exclusion else (), groups)
            both = [sorted({*matching, *others}) for matching, others in zip(positions, by_default, strict=True)]
            self._excluded += both[len(self._excluded) :]
        for group, excluded in zip(groups, self._excluded, strict=False):
            if missing_keys(group):
                adopt_group(group, self._settings, step=self.step_count)
            group["gradreg_excluded"] = excluded

    def _groups_with_names(self) -> list[dict[str, Any]]:
        return self.param_groups if self._named_groups is None else self._named_groups()

    def _patterns(self) -> tuple[str, ...]:
        return () if self.exclude == NOTHING else self.exclude

    def leave_out(self, parameters: Iterable[Tensor]) -> None:
        """Exclude ``parameters`` as ``exclude`` does; raise if no trainable parameter would be left to regularize."""
        self._adopt_new_groups()
        groups, trainable, left = self._groups_with_names(), 0, 0
        for number, positions in enumerate(positions_of(parameters, groups)):
            self._excluded[number] = sorted({*positions, *self._excluded[number]})
            of_group = {i for i, parameter in enumerate(groups[number]["params"]) if parameter.requires_grad}
            trainable += len(of_group)
            left += len(of_group.difference(self._excluded[number]))
        if not trainable:
            raise ValueError(
                "The optimizer has no trainable parameter: nothing would be trained. Build it on parameters with "
                "requires_grad=True; if an adapter is created later, call peft.get_peft_model(model, config) first, or "
                "let the trainer create the optimizer and call attach(trainer)."
            )
        if not left:
            raise ValueError(
                "Every trainable parameter of the optimizer is excluded: nothing is left to regularize. "
                "Pass exclude='none' to regularize embeddings and heads too."
            )
        self._adopt_new_groups()

    # Strength over time.

    @property
    def step_count(self) -> int:
        """Optimizer steps taken so far; saved with the groups."""
        return int(self.param_groups[0].get("gradreg_step", 0))

    def _advance(self) -> None:
        step = self.step_count + 1
        for group in self.param_groups:
            group["gradreg_step"] = step

    def plan(self, storage: Storage | None = None) -> Plan:
        """The settings of the step to come, on ``storage`` if it is at hand; validated when one has been changed."""
        groups = self.param_groups
        if self._settled is None or self._settled[0] != _read(groups):
            self._settled = self._settle()
        plan, group, step = self._settled[1], groups[0], self.step_count
        if distributed.is_available() and distributed.is_initialized():
            self._check_engine(groups, step)
        if group["gradreg_warmup_steps"] or group["gradreg_schedule"] or self._schedule:
            factor = strength_factor(
                step,
                warmup_steps=group["gradreg_warmup_steps"],
                schedule=self._schedule or group["gradreg_schedule"],
                schedule_steps=group["gradreg_schedule_steps"],
            )
            plan = replace(plan, strengths=tuple(strength * factor for strength in plan.strengths))
        since_warmup = step - group["gradreg_warmup_steps"]
        if not any(plan.strengths) or since_warmup % group["gradreg_every"]:
            return replace(plan, step=step, points=())
        radius = START if group["gradreg_auto_radius"] is None else group["gradreg_auto_radius"]
        plan = replace(plan, step=step, floor=group["gradreg_floor"], auto_radius=radius)
        usual = plan.scheme.points
        points = plan.scheme.checked_points if self._check_is_due(group) else usual
        low = self._losses.low_dtype if self._attachment is None else self._attachment.low_dtype
        is_checked = group["gradreg_check_every"] is not None or plan.is_always_auto
        if not is_checked and low is None and not (storage or self.storage()).has_low_precision:
            return replace(plan, points=usual, points_if_low=points)
        return replace(plan, points=points, low_dtype=low)

    def _settle(self) -> tuple[list[Any], Plan]:
        """What :meth:`plan` compares settings with, and what of the plan stays until they change."""
        self._adopt_new_groups()
        plan = settled_plan(self.param_groups, self._excluded, self._model)
        return _read(self.param_groups), plan

    def _remember(self, outcome: Outcome) -> None:
        """Keep in the groups what a step found out for those to come."""
        found: dict[str, Any] = {} if outcome.auto_radius is None else {"gradreg_auto_radius": outcome.auto_radius}
        if outcome.check is not None and not outcome.check.is_swallowed:
            found["gradreg_floor"] = outcome.check.floor
        for group in self.param_groups if found else []:
            group.update(found)

    @property
    def regularizes(self) -> bool:
        """Whether the step to come takes a second gradient."""
        return self.plan().regularizes

    def _check_is_due(self, group: dict[str, Any]) -> bool:
        """Whether the step to come is one of a check, by default of those in low precision."""
        every = DEFAULT_CHECK_EVERY if group["gradreg_check_every"] is None else group["gradreg_check_every"]
        # Of ``gradreg_every`` steps in a row one is regularized: it is checked if the round number is among them.
        return bool(every) and (group["gradreg_floor"] is None or self.step_count % every < group["gradreg_every"])

    def _step_wrapped(self, step: Callable[..., Any], *args: Any) -> None:
        """Call ``step(*args)``, by which the wrapped optimizer steps; in the wrapper's step, without hooks on every one."""
        with without_global_hooks() if self._is_in_step else nullcontext():
            step(*args)

    @abstractmethod
    def storage(self) -> Storage:
        """Where gradients and weights are in the step to come."""

    # Checkpoints and pickling.

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state dict; its groups carry the ``gradreg_*`` keys. Loads into either of the two."""
        self._adopt_new_groups()
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state = self.optimizer.state_dict()
        for after in self._optimizer_state_dict_post_hooks.values():
            state = after(self, state) or state
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this wrapper, or of the bare optimizer; for the latter, warn and keep current settings."""
        self._adopt_new_groups()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        current = [{key: group[key] for key in KEYS} for group in self.param_groups]
        self.optimizer.load_state_dict(state_dict)
        warn_of_replaced(self.param_groups, current, self._settings)
        for group in self.param_groups:
            drop_keys(group, DELETED)
        missing = sorted({key for group in self.param_groups for key in missing_keys(group)})
        if missing:
            what = f"The loaded optimizer state has no {', '.join(missing)}: it was saved without GradRegOptimizer. "
            warnings.warn(f"{what}Settings stay as constructed, and warm-up and schedule start at step 0.", stacklevel=2)
        for group, own in zip(self.param_groups, current, strict=True):
            for key, value in {**own, "gradreg_step": 0}.items():
                group.setdefault(key, value)
        self._adopt_new_groups()  # what is excluded is a matter of this model's parameters, not the saved run's
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the model and the trainer, which are not the optimizer's to pickle."""
        foreign = ("step", "_default_exclusion")  # an LR scheduler's, which would step the original instead of the copy
        own = {k: v for k, v in self.__dict__.items() if k not in foreign and not k.startswith("_optimizer_")}
        return own | dict.fromkeys(("_model", "_attachment", "_settled", "_running", "_pending"))

    # Trainers.

    def train(self) -> None:
        """Called by trainers before each micro-batch: there the wrapper finds the trainer that drives it."""
        upwards.attach_to_caller(self)
        inner = getattr(self.optimizer, "train", None)  # schedule-free optimizers have one
        if callable(inner):
            inner()


for _name in BRIEFLY:
    setattr(OptimizerWrapper, _name, brief(_name))


def _read(groups: list[dict[str, Any]]) -> list[list[Any]]:
    """The settings as they are now, what is excluded, and how many keys there are: a new one may be misspelt."""
    return [[len(group), *(group.get(key) for key in (*SETTING_KEYS, "gradreg_excluded"))] for group in groups]
