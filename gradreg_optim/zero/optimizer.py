"""ZeroGradRegOptimizer: the regularized step on a DeepSpeed engine with ZeRO.

It differs from :class:`~gradreg_optim.GradRegOptimizer` in its storage, which is the engine's partitions
(:mod:`gradreg_optim.zero.storage`), in the context of each pass (:mod:`gradreg_optim.zero.engines`), and in
the optimizer step, which is the engine's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

from deepspeed import DeepSpeedEngine
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import Unpack  # comes with torch; in typing from Python 3.11

from gradreg_optim.core.plan import Plan
from gradreg_optim.core.replicas import Part
from gradreg_optim.core.step import Point
from gradreg_optim.core.storage import Storage
from gradreg_optim.optimizer import GradRegOptimizer
from gradreg_optim.wrapping.groups import KEYS
from gradreg_optim.wrapping.settings import PUBLISHED, Settings, check_names, settings_among
from gradreg_optim.wrapping.wrapper import OptimizerWrapper
from gradreg_optim.zero.engines import HeldStep, accumulation_windows, check_engine
from gradreg_optim.zero.gathered import BF16Partitions, Stage12Partitions
from gradreg_optim.zero.stage3 import Stage3Partitions
from gradreg_optim.zero.storage import WholeGradients

OF_ENGINE = {"model", "scaler", "rounding"}
"""Settings that the engine makes pointless: it has the model, the loss scale and fp32 masters."""


def _holder(engine: Any) -> Any:
    """What holds the client optimizer as ``optimizer``: DeepSpeed's own, or the engine if there is none."""
    return engine if isinstance(engine.optimizer, Optimizer) else engine.optimizer


class ZeroGradRegOptimizer(GradRegOptimizer):
    """Gradient regularization under DeepSpeed's ZeRO stages 0 to 3. Whatever DeepSpeed shards stays sharded.

    Args:
        engine: the engine that ``deepspeed.initialize`` returned. Its client optimizer, stage, precision,
            clipping, loss scaling and LR scheduler work unchanged. ``gradient_clipping`` acts on the combined
            gradient.
        settings: those of :class:`~gradreg_optim.GradRegOptimizer`, but for ``model``, ``scaler`` and
            ``rounding``, which the engine decides. ``exclude`` matches the parameter names of
            ``engine.module``.

    Raises:
        TypeError: ``engine`` is no DeepSpeed engine, or there is no setting of a given name.
        ValueError: the engine keeps weights or gradients where a second gradient cannot be taken (pipeline,
            experts, NVMe, …), or a setting breaks its rule.

    Memory beyond plain DeepSpeed: g1, one partition in the dtype in which gradients are accumulated. On N
    ranks that is 4/N bytes a parameter in fp32 and 2/N in bf16 or fp16. Stage 0 has no partitions: g1 is
    whole, and θ is copied.

    Communication beyond two backward passes and one step: two all_reduces of a few float32 numbers (norms,
    before and after the second pass), and that of :class:`~gradreg_optim.zero.gathered.GatheredPartitions`
    (stages 1 and 2), :class:`~gradreg_optim.zero.gathered.BF16Partitions` or
    :class:`~gradreg_optim.zero.stage3.Stage3Partitions`.

    The perturbed weights are round(fp32 master + ε·d); in stage 0 they are round(weight + ε·d). Only the
    engine's step writes to the masters. It then copies them to the model, which also moves the weights from
    θ' to the new θ.

    Example::

        engine, *_ = deepspeed.initialize(model=model, optimizer=AdamW(model.parameters()), config=config)
        optimizer = ZeroGradRegOptimizer(engine)

        def closure():                       # the usual inner loop over one accumulation window
            for batch in micro_batches:
                loss = engine(batch)
                engine.backward(loss)
                engine.step()
            return loss

        optimizer.step(closure)              # runs it twice and takes exactly one engine step

    In your own loop, put that inner loop into the body of ``for _ in optimizer.passes():``. The end of the
    loop takes the engine's step.
    """

    def __init__(self, engine: DeepSpeedEngine, **settings: Unpack[Settings]) -> None:
        check_names(type(self).__name__, settings)
        for name in OF_ENGINE.intersection(settings):
            if settings.get(name) == PUBLISHED.get(name, ()):  # which is what the engine does
                continue
            raise TypeError(
                f"{type(self).__name__} got {name!r}, which the engine decides: it has the model, the loss "
                "scale and fp32 masters. Leave it out."
            )
        check_engine(engine)
        holder = _holder(engine)
        if isinstance(holder.optimizer, OptimizerWrapper):  # this one takes its place and shares its groups
            holder.optimizer = engine.basic_optimizer = holder.optimizer.optimizer
        self.engine, self.held_step = engine, HeldStep(engine)
        self._is_stepping = False  # whether the engine's step is running
        self._has_stepped = False  # whether the end of a loop has run it: a step() that follows does nothing
        kinds = (BF16Partitions, Stage3Partitions, Stage12Partitions)
        self._storage: Any = next(
            (kind for kind in kinds if hasattr(engine.optimizer, kind.MASTERS)), WholeGradients
        )(engine)
        named = {"model": engine.module, "named_groups": self._storage.named_groups}
        self._set_up(holder.optimizer, settings_among(settings), exclude=settings.get("exclude", ()), **named)
        self._clearing.is_seen = True  # the engine clears gradients itself

    @classmethod
    def taking_over(
        cls,
        engine: DeepSpeedEngine,
        wrapper: GradRegOptimizer | None,
        settings: dict[str, Any],
        excluded: Iterable[Tensor],
    ) -> ZeroGradRegOptimizer:
        """Create the optimizer of an engine that a trainer drives, and make it the engine's client optimizer.

        It gets the settings and groups of ``wrapper``; without one, ``settings``. ``excluded`` are the
        model's parameters to leave out: the groups of ``wrapper`` hold flat partitions by now.
        """
        groups = [{key: group[key] for key in KEYS} for group in (wrapper.param_groups if wrapper else ())]
        if wrapper is not None:
            settings = {**wrapper._settings, "schedule": wrapper._schedule or wrapper._settings["schedule"]}
        optimizer = cls(engine, **{name: value for name, value in settings.items() if name not in OF_ENGINE})
        if wrapper is not None:
            optimizer.exclusion.patterns = wrapper.exclude
        for group, values in zip(optimizer.param_groups, groups, strict=False):
            group.update(values)
        optimizer.leave_out(excluded)
        _holder(engine).optimizer = engine.basic_optimizer = optimizer
        return optimizer

    # Overridden phases of the step.

    def storage(self, part: Part) -> Any:
        """The engine's partitions; in stage 0 its whole gradients, as they are seen in one step."""
        if isinstance(self._storage, WholeGradients):
            self._storage = WholeGradients(self.engine, is_first=not self.progress.is_proven, part=part)
        self._storage.part = part
        return self._storage

    def surroundings(self, storage: Storage, plan: Plan) -> Callable[[Point], AbstractContextManager[Any]]:
        """An accumulation window around each pass."""
        self._has_stepped = False
        around, is_apart = super().surroundings(storage, plan), self._storage.part.of > 1
        return accumulation_windows(self.engine, self.held_step, around, is_apart=is_apart)

    def _base_step(self) -> None:
        """Take the engine's step that was held back, on the combined gradient."""
        self._is_stepping = True
        if self._attachment is None:
            self.engine.micro_steps += self._storage.part.of - 1  # each of them was a window of its own
        try:
            self._step_wrapped(self.held_step.take)
        finally:
            self._is_stepping = False
        if self._storage.is_moved and not self.engine.was_step_applied():
            self._storage.restore()  # after an overflow the engine copies no masters
        self._storage.is_moved = False
        self._advance()

    def _end_loop(self) -> None:
        """Take the engine's step, which the body called. A ``step()`` after the loop then does nothing."""
        self._base_step()
        self._has_stepped = True

    def _step_on_gradients(self, was_under_way: bool, closure: Callable[[], Any] | None = None) -> None:
        if self._is_stepping:  # the engine's step calls its client optimizer once a group
            self._step_wrapped(self.optimizer.step)
        elif self._has_stepped:
            self._has_stepped = False
        else:
            super()._step_on_gradients(was_under_way, closure)

    def finish_window(self) -> None:
        """Take the engine's step that was held back while a trainer ran the window."""
        self._attachment.check_consulted()
        self._base_step()
