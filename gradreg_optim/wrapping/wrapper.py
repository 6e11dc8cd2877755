"""The outside of the wrapper: one real ``torch.optim.Optimizer`` that shares everything with the one inside.

LR schedulers, Accelerate, GradScaler and checkpointing all hold on to ``param_groups``, ``state`` and
``defaults``; here these are the wrapped optimizer's own objects, so that there is nothing to keep in step.
"""

import functools
import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from operator import attrgetter
from typing import Any
from unittest.mock import patch

from torch import Tensor, nn
from torch.optim import Optimizer

# Private; test_wrapper.py fails when they disappear.
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from gradreg_optim.core.plan import Plan
from gradreg_optim.core.step import Outcome
from gradreg_optim.wrapping import upwards
from gradreg_optim.wrapping.exclusion import Exclusion
from gradreg_optim.wrapping.groups import (
    DELETED_KEYS,
    KEYS,
    SETTING_KEYS,
    Planner,
    adopt_group,
    check_brought,
    drop_keys,
    is_state_initialization,
    missing_keys,
    modernize,
    warn_of_replaced,
)
from gradreg_optim.wrapping.refusals import check_arguments, check_wrappable
from gradreg_optim.wrapping.settings import PLACES, SHARED, check_settings


def shared(name: str, *default: Any) -> Any:
    """An attribute of the wrapped optimizer that is the wrapper's as well."""
    read = (
        (lambda self: getattr(self.optimizer, name, *default)) if default else attrgetter(f"optimizer.{name}")
    )
    return property(read, lambda self, value: setattr(self.optimizer, name, value))


def run_hooks_around(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return the wrapper's ``step`` with hooks around it, as torch does, but without a profiler's range."""
    # The update alone has a range, the wrapped optimizer's. Hooks on every optimizer see the wrapper,
    # which the loop has.

    @functools.wraps(step)
    def hooked(*args: Any, **kwargs: Any) -> Any:
        wrapper = args[0]
        for before in (*_global_optimizer_pre_hooks.values(), *wrapper._optimizer_step_pre_hooks.values()):
            args, kwargs = before(wrapper, args, kwargs) or (args, kwargs)
        with patch.object(wrapper, "_is_in_step", True):
            result = step(*args, **kwargs)
        for after in (*wrapper._optimizer_step_post_hooks.values(), *_global_optimizer_post_hooks.values()):
            after(wrapper, args, kwargs)
        return result

    return hooked


class OptimizerWrapper(Optimizer):
    """Delegation, hyperparameters in the groups, checkpoints and pickling; subclasses define the step."""

    profile_hook_step = staticmethod(run_hooks_around)  # type: ignore[assignment]
    _is_state_initialization = is_state_initialization
    # Composer's trainer (0.32) asks in fp16, and then unscales in the closure.
    _step_supports_amp_closure = True

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
                "optimizer is a GradRegOptimizer already: one wrapper regularizes. Pass "
                "the optimizer inside it."
            )
        check_arguments(model, scaler)
        check_settings(**settings)
        self.optimizer = optimizer
        self._schedule = settings["schedule"] if callable(settings["schedule"]) else None
        # Like LambdaLR's, a callable is not saved.
        self._settings = settings if self._schedule is None else {**settings, "schedule": None}
        self._model, self._scaler = model, scaler
        self._attachment: Any = None
        self._is_in_step = False
        # Optimizer's step hooks, without Optimizer.__init__, which would build groups of its own.
        self.__setstate__({})
        self._named_groups = named_groups
        self.exclusion = Exclusion(exclude, model, self._groups_with_names())
        for group in self.param_groups:
            # Wrapped before, or loaded from a checkpoint: these settings count, and its step.
            if "gradreg_step" in group:
                drop_keys(group, (*SETTING_KEYS, *DELETED_KEYS))
            check_brought(
                group,
                {**{f"gradreg_{name}": self._settings[name] for name in SHARED}, **self.param_groups[0]},
            )
        for group in self.param_groups:
            adopt_group(group, self._settings, step=0)
        self._planner = Planner()
        self._adopt_new_groups()
        self._planner.settled(self.param_groups, self.exclusion.positions)
        upwards.announce()

    # One optimizer: groups, state and defaults are the wrapped one's.

    param_groups = shared("param_groups")
    state = shared("state")
    defaults = shared("defaults", {})

    def __getattr__(self, name: str) -> Any:
        """Forward attributes of the wrapped optimizer, such as ``eval``; private ones only if callable."""
        # Do not forward private flags: GradScaler reads ``_step_supports_amp_scaling`` and would assume that
        # the wrapper unscales by itself.
        if not name.startswith("__") and "optimizer" in self.__dict__:
            value = getattr(self.optimizer, name, self)
            if value is not self and (callable(value) or not name.startswith("_")):
                return value
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

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
        """Complete groups without ``gradreg_*`` keys, as ``optimizer.add_param_group`` adds them."""
        excluded = self.exclusion.update(self._groups_with_names(), self._model)
        for group, positions in zip(self.param_groups, excluded, strict=False):
            if "gradreg_step" not in group:
                adopt_group(group, self._settings, step=self.step_count)
            group["gradreg_excluded"] = positions

    def _groups_with_names(self) -> list[dict[str, Any]]:
        return self.param_groups if self._named_groups is None else self._named_groups()

    @property
    def exclude(self) -> tuple[str, ...]:
        """The patterns of names that are left out."""
        return self.exclusion.patterns

    def leave_out(self, parameters: Iterable[Tensor]) -> None:
        """Exclude ``parameters`` as ``exclude`` does; raise if no trainable parameter would be left."""
        self._adopt_new_groups()
        self.exclusion.leave_out(parameters, self._groups_with_names())
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

    def plan(self) -> Plan:
        """The settings of the step to come; validated when one has been changed."""
        self._adopt_new_groups()
        return self._planner(self.param_groups, self.exclusion.positions, self._schedule)

    def _remember(self, outcome: Outcome) -> None:
        """Keep in the groups what a step found out for those to come."""
        check, settling = outcome.check, outcome.settling
        found = {
            "gradreg_auto_radius": outcome.auto_radius,
            "gradreg_floor": None if check is None or check.is_swallowed else check.floor,
            "gradreg_is_low": outcome.is_low,
            "gradreg_ratio_total": None if settling is None else settling.total,
            "gradreg_ratio_count": None if settling is None else settling.count,
        }
        for group in self.param_groups:
            group.update({key: value for key, value in found.items() if value is not None})

    def _step_wrapped(self, step: Callable[..., Any], *args: Any) -> None:
        """Step the wrapped optimizer by ``step(*args)``; inside the wrapper's step, without global hooks."""
        everywhere: tuple[Any, ...] = (_global_optimizer_pre_hooks, _global_optimizer_post_hooks)
        with ExitStack() as stack:
            for hooks in everywhere if self._is_in_step else ():
                stack.enter_context(patch.dict(hooks, clear=True))
            step(*args)

    # Checkpoints and pickling.

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state dict, with ``gradreg_*`` keys in its groups; both can load it."""
        self._adopt_new_groups()
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state = self.optimizer.state_dict()
        for after in self._optimizer_state_dict_post_hooks.values():
            state = after(self, state) or state
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this wrapper, or of the bare optimizer with a warning and current settings."""
        self._adopt_new_groups()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        current = [{key: group[key] for key in KEYS} for group in self.param_groups]
        self.optimizer.load_state_dict(state_dict)
        warn_of_replaced(self.param_groups, current, self._settings)
        for group in self.param_groups:
            modernize(group)
        missing = sorted({key for group in self.param_groups for key in missing_keys(group)})
        if missing:
            warnings.warn(
                f"The loaded optimizer state has no {', '.join(missing)}: it was saved without "
                "GradRegOptimizer. Settings stay as constructed, and warm-up and schedule start at step 0.",
                stacklevel=2,
            )
        for group, own in zip(self.param_groups, current, strict=True):
            for key, value in {**own, "gradreg_step": 0}.items():
                group.setdefault(key, value)
        # What is excluded is a matter of this model's parameters, not the saved run's.
        self._adopt_new_groups()
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the model and the trainer, which are not the optimizer's to pickle."""
        # "step" is an LR scheduler's, which would step the original instead of the copy.
        own = {k: v for k, v in self.__dict__.items() if k != "step" and not k.startswith("_optimizer_")}
        return own | dict.fromkeys(("_model", "_attachment"))
