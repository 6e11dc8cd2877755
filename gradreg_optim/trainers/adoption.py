"""Makes a wrapper the optimizer of a trainer, and gives the trainer its own optimizer back."""

from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import Tensor
from torch.optim import Optimizer
from transformers import Trainer

from gradreg_optim.optimizer import GradRegOptimizer
from gradreg_optim.trainers.exclusion import added_exclusion
from gradreg_optim.wrapping.groups import KEYS, drop_keys
from gradreg_optim.wrapping.settings import exclude_patterns


def find_wrapper(optimizer: Any) -> GradRegOptimizer | None:
    """Find the :class:`GradRegOptimizer` inside other wrappers of an optimizer; ``None`` if there is none."""
    while optimizer is not None and not isinstance(optimizer, GradRegOptimizer):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


class Adoption:
    """The wrapper of one trainer: given, built around what it creates, or rebuilt on DeepSpeed's partitions.

    ``optimizer`` is the wrapper, ``None`` until the trainer has created an optimizer.
    """

    def __init__(
        self, trainer: Trainer, given: GradRegOptimizer | None, settings: dict[str, Any], attachment: Any
    ) -> None:
        self.optimizer: Any = None
        self.is_sharded = trainer.accelerator.distributed_type == DistributedType.DEEPSPEED
        self._trainer = trainer
        self._settings = settings
        self._attachment = attachment
        self._excluded: list[Tensor] = []
        self._groups_before: list[dict[str, Any]] = []
        if given is not None:
            self._adopt(given)
        elif trainer.optimizer is not None:
            self._wrap()
        self._given = self.optimizer
        # Under DeepSpeed, Transformers drops the optimizer that it was given.
        if given is None or self.is_sharded:
            attachment.patches.answer(trainer, "create_optimizer", self._create_optimizer)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that the wrapper was given, or will be."""
        if (own := self.optimizer) is None:
            return self._settings
        schedule = own._schedule or own._settings["schedule"]
        return {**own._settings, "schedule": schedule, "exclude": own.exclude}

    def _create_optimizer(self, create: Any, *args: Any, **kwargs: Any) -> Any:
        trainer = self._trainer
        if self.is_sharded and self._given is not None and trainer.optimizer is None:
            if self.optimizer is not self._given:
                raise RuntimeError(
                    "Under DeepSpeed an optimizer that was given as optimizers= can train only once: "
                    "DeepSpeed has replaced its parameters by partitions. Build a new trainer, or let the "
                    "trainer create the optimizer and call attach(trainer)."
                )
            trainer.optimizer = self._given
        create(*args, **kwargs)
        if find_wrapper(trainer.optimizer) is None and isinstance(trainer.optimizer, Optimizer):
            self._wrap()
        return trainer.optimizer

    def _wrap(self) -> None:
        """Wrap the trainer's optimizer."""
        holder: Any = self._trainer
        while isinstance(holder.optimizer, AcceleratedOptimizer):  # from an earlier training
            holder = holder.optimizer
        groups = holder.optimizer.param_groups
        self._groups_before = [{key: group[key] for key in KEYS if key in group} for group in groups]
        try:
            optimizer = GradRegOptimizer(holder.optimizer, **{"model": self._trainer.model, **self._settings})
            self._adopt(optimizer)
        except BaseException:
            self._restore(groups)
            raise
        _replace_optimizer(holder, optimizer)

    def _adopt(self, optimizer: GradRegOptimizer) -> None:
        def added() -> list[Any]:
            return added_exclusion(optimizer.exclude, self._trainer.model)

        self._attachment.patches.set(optimizer.exclusion, "default", added)  # for groups that are added later
        optimizer.leave_out(added())
        self._excluded = [
            group["params"][i] for group in optimizer.param_groups for i in group["gradreg_excluded"]
        ]
        self._connect(optimizer)

    def _connect(self, optimizer: GradRegOptimizer) -> None:
        """Give the wrapper the attachment, and the trainer's model and scaler."""
        if optimizer._attachment is not None:  # of another trainer, which attaches again when it trains again
            optimizer._attachment.patches.close()
        patches, model = self._attachment.patches, optimizer._model
        patches.set(optimizer, "_scaler", self._trainer.accelerator.scaler)
        patches.set(optimizer, "_attachment", self._attachment)
        patches.set(optimizer, "_model", self._trainer.model if model is None else model)
        self.optimizer = optimizer

    def shard(self) -> None:
        """Rebuild the wrapper on the partitions of the DeepSpeed engine that now holds the optimizer."""
        from gradreg_optim.zero import ZeroGradRegOptimizer  # nothing else in this package needs DeepSpeed

        engine: Any = self._trainer.model_wrapped
        wrapper = self.optimizer
        if isinstance(wrapper, ZeroGradRegOptimizer) and wrapper.engine is engine:
            return
        if wrapper is None:  # the optimizer comes from DeepSpeed's configuration
            self._excluded = [
                *added_exclusion(exclude_patterns(self._settings.get("exclude")), self._trainer.model)
            ]
        self._connect(ZeroGradRegOptimizer.taking_over(engine, wrapper, self._settings, self._excluded))
        accelerated: Any = self._trainer.optimizer
        accelerated.optimizer = engine.optimizer  # another one now, in stage 0 of fp32

    def check_trains(self) -> None:
        """Raise if the optimizer holds nothing that the trainer trains, after the first backward of a window.

        That is no trainable parameter of the model, and none that has got a gradient; or none of PEFT's
        adapters.
        """
        model: Any = self._trainer.model
        held = {id(p): p for group in self.optimizer._groups_with_names() for p in group["params"]}
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        prefix = getattr(model.base_model, "prefix", "") if hasattr(model, "peft_config") else ""
        adapters = [parameter for name, parameter in trainable.items() if prefix and prefix in name]
        is_reached = not self.is_sharded and any(parameter.grad is not None for parameter in held.values())
        is_held = any(id(parameter) in held for parameter in adapters or trainable.values())
        if not is_held and (adapters or not is_reached):
            raise RuntimeError(
                f"{type(self._trainer).__name__}: none of the {len(adapters or trainable)} parameters that "
                f"the model trains ({next(iter(trainable), 'it trains none')}, …) is in the optimizer, so "
                "nothing would be trained. An optimizer that was built before the trainer got peft_config= "
                "lacks the adapters: call peft.get_peft_model(model, config) first and build the optimizer "
                "on its parameters, or let the trainer create the optimizer and call attach(trainer)."
            )

    def give_back(self) -> None:
        """Give the trainer the wrapped optimizer, with its groups as they were."""
        holder: Any = self._trainer
        while holder is not None and (inner := getattr(holder, "optimizer", None)) is not self.optimizer:
            holder = inner
        if self.optimizer is not None and holder is not None:
            _replace_optimizer(holder, self.optimizer.optimizer)
            self._restore(self.optimizer.param_groups)

    def _restore(self, groups: list[dict[str, Any]]) -> None:
        """Remove the keys that wrapping added to ``groups``; a wrapper that was given keeps its settings."""
        for group, before in zip(groups, self._groups_before, strict=False):
            drop_keys(group, KEYS)
            group.update(before)


def _replace_optimizer(holder: Any, optimizer: Optimizer) -> None:
    """Replace the optimizer that ``holder``, a trainer or Accelerate's wrapper, holds."""
    holder.optimizer = optimizer
    if isinstance(holder, AcceleratedOptimizer):
        holder.__setstate__({})  # under a GradScaler it caches the step method of its optimizer
