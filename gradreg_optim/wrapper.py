"""The outside of the wrapper: one real ``torch.optim.Optimizer`` that shares everything with the one inside.

LR schedulers, Accelerate, GradScaler and checkpointing all hold on to ``param_groups``, ``state`` and ``defaults``; here
these are the wrapped optimizer's own objects, so that there is nothing to keep in step.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradreg_optim.config import check_settings, exclude_patterns
from gradreg_optim.groups import KEYS, PER_GROUP, SHARED, adopt_group, check_group, excluded_positions, missing_keys
from gradreg_optim.schedule import strength_factor

if TYPE_CHECKING:
    from gradreg_optim.attachment import Attachment

NOTHING = ("none",)
"""The value of ``exclude`` that leaves nothing out, not even where a default would."""


class OptimizerWrapper(Optimizer):
    """Delegation, hyperparameters in the groups, checkpoints and pickling; what a step does is left to the subclass."""

    def __init__(
        self,
        optimizer: Optimizer,
        settings: dict[str, Any],
        *,
        exclude: str | Iterable[str],
        model: nn.Module | None,
    ) -> None:
        _check_optimizer(optimizer)
        check_settings(**settings)
        self.optimizer = optimizer
        self._settings = settings
        self._schedule = settings["schedule"] if callable(settings["schedule"]) else None
        if self._schedule is not None:
            self._settings = {**settings, "schedule": None}  # like LambdaLR's, a callable is not saved
        self._model = model
        self._attachment: Attachment | None = None
        self.exclude = exclude_patterns(exclude)
        # The step-hook machinery of Optimizer, without Optimizer.__init__, which would build groups of its own.
        self.__setstate__({})
        positions = excluded_positions(self._parameter_groups(), self._patterns(), model)
        for group, excluded in zip(self.param_groups, positions, strict=True):
            if "gradreg_step" in group:  # wrapped before, or loaded from a checkpoint: these settings count, and its step
                group = _without(group, (*PER_GROUP, *SHARED))
            adopt_group(group, self._settings, step=0, excluded=excluded)
            group["gradreg_excluded"] = excluded
        if "transformers.trainer" in sys.modules:  # its DeepSpeed integration has to be told that there are wrappers
            import gradreg_optim.trainer  # noqa: F401 - upwards, hence here

    # One optimizer: groups, state and defaults are the wrapped one's.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's groups."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The wrapped optimizer's state; the wrapper keeps none of its own."""
        return self.optimizer.state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The wrapped optimizer's defaults."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    def __getattr__(self, name: str) -> Any:
        """Public attributes of the wrapped optimizer, such as the ``eval`` of schedule-free ones."""
        # Private ones stay out: GradScaler would take a fused optimizer's flag for a promise of the wrapper.
        if name.startswith("_") or "optimizer" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.optimizer, name)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch; it may bring ``gradreg_*`` keys and inherits the others."""
        self.optimizer.add_param_group(param_group)
        self._adopt_new_groups()

    def _adopt_new_groups(self) -> None:
        """Complete groups that came without ``gradreg_*`` keys, as after ``add_param_group`` on the wrapped optimizer."""
        groups = self.param_groups
        if any(missing_keys(group) for group in groups):
            positions = excluded_positions(self._parameter_groups(), self._patterns(), self._model, must_match=False)
            for group, excluded in zip(groups, positions, strict=True):
                if missing_keys(group):
                    adopt_group(group, self._settings, step=self.step_count, excluded=excluded)

    def _patterns(self) -> tuple[str, ...]:
        return () if self.exclude == NOTHING else self.exclude

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """Groups whose ``params`` are the model's parameters, to which ``exclude`` and its positions refer."""
        return self.param_groups

    def leave_out(self, parameters: Iterable[Tensor]) -> None:
        """Exclude ``parameters`` as ``exclude`` does.

        Raises:
            ValueError: no trainable parameter would be left to regularize.
        """
        unwanted = {id(parameter) for parameter in parameters}
        left = 0
        for group, named in zip(self.param_groups, self._parameter_groups(), strict=True):
            positions = {i for i, parameter in enumerate(named["params"]) if id(parameter) in unwanted}
            group["gradreg_excluded"] = sorted(positions | set(group["gradreg_excluded"]))
            left += len(named["params"]) - len(group["gradreg_excluded"])
        if not left:
            raise ValueError(
                "Every parameter of the optimizer is excluded: nothing is left to regularize. "
                "Pass exclude='none' to regularize embeddings and heads too."
            )

    # Strength over time.

    @property
    def step_count(self) -> int:
        """Optimizer steps taken so far; saved with the groups."""
        return int(self.param_groups[0].get("gradreg_step", 0))

    def _advance(self) -> None:
        step = self.step_count + 1
        for group in self.param_groups:
            group["gradreg_step"] = step

    def _strengths(self) -> list[float]:
        """Each group's strength in the step to come."""
        self._adopt_new_groups()
        for group in self.param_groups:
            check_group(group)
        shared = self.param_groups[0]
        factor = strength_factor(
            self.step_count,
            warmup_steps=shared["gradreg_warmup_steps"],
            schedule=self._schedule or shared["gradreg_schedule"],
            schedule_steps=shared["gradreg_schedule_steps"],
        )
        return [group["gradreg_strength"] * factor for group in self.param_groups]

    @property
    def regularizes(self) -> bool:
        """Whether the step to come takes a second gradient."""
        return any(strength > 0 for strength in self._strengths()) and self._is_turn()

    def _is_turn(self) -> bool:
        """Whether the step to come is the first after the warm-up, or one of each ``every`` from there on."""
        group = self.param_groups[0]
        return (self.step_count - int(group["gradreg_warmup_steps"])) % int(group["gradreg_every"]) == 0

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
        current = [{key: group[key] for key in KEYS if key in group} for group in self.param_groups]
        self.optimizer.load_state_dict(state_dict)
        missing = sorted({key for group in self.param_groups for key in missing_keys(group)} - {"gradreg_excluded"})
        if missing:
            warnings.warn(
                f"The loaded optimizer state has no {', '.join(missing)}: it was saved without GradRegOptimizer. "
                "Settings stay as constructed, and warm-up and schedule start at step 0.",
                stacklevel=2,
            )
        for group, own in zip(self.param_groups, current, strict=True):
            group["gradreg_excluded"] = own.pop("gradreg_excluded")  # about this model's parameters, not the saved run's
            own["gradreg_step"] = 0
            for key, value in own.items():
                group.setdefault(key, value)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the model and the trainer, which are not the optimizer's to pickle."""
        hooks_and_foreign = (
            "_model",
            "_attachment",
            "step",  # an LR scheduler's, which would step the original instead of the copy
            *(name for name in self.__dict__ if name.startswith("_optimizer_")),
        )
        state = {name: value for name, value in self.__dict__.items() if name not in hooks_and_foreign}
        return {**state, "_model": None, "_attachment": None}

    # Trainers.

    def train(self) -> None:
        """Called by trainers before each micro-batch: there the wrapper finds the trainer that drives it."""
        if "transformers" in sys.modules:
            from gradreg_optim.trainer import attach_to_caller  # upwards, hence here: only trainers ever need it

            attach_to_caller(self)
        inner = getattr(self.optimizer, "train", None)  # schedule-free optimizers have one
        if callable(inner):
            inner()

    def _is_state_initialization(self) -> bool:
        """Whether this is torch.distributed.checkpoint creating state: no state yet, rates of 0, gradients of 0."""
        groups = self.param_groups
        return (
            not self.state
            and all(float(group.get("lr", 0.0)) == 0.0 for group in groups)
            and not any(p.grad is not None and bool(p.grad.any()) for group in groups for p in group["params"])
        )

    def _parameters(self) -> Iterator[Tensor]:
        """Those of all groups."""
        return (parameter for group in self.param_groups for parameter in group["params"])

    def _devices(self) -> set[torch.device]:
        return {parameter.device for parameter in self._parameters()}


def _without(group: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    for name in names:
        group.pop(f"gradreg_{name}", None)
    return group


def _check_optimizer(optimizer: Optimizer) -> None:
    """Refuse what cannot be wrapped, before anything is changed."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer={optimizer!r} is a {type(optimizer).__name__}: an instance of torch.optim.Optimizer is wrapped. "
            "Pass, for example, torch.optim.AdamW(model.parameters())."
        )
    if isinstance(optimizer, OptimizerWrapper):
        raise ValueError("optimizer is a GradRegOptimizer already: one wrapper regularizes. Pass the optimizer inside it.")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"optimizer={type(optimizer).__name__}: its step needs a closure of its own, but the combined gradient "
            "exists at one point only. Use an optimizer that steps on gradients, such as AdamW or SGD."
        )
