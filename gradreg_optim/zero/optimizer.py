"""ZeroGradRegOptimizer: the regularized step on the partitions of DeepSpeed's ZeRO optimizers.

The algorithm is the same. What differs is where gradients and weights are kept (:mod:`gradreg_optim.zero.storage`), what a
pass is (:mod:`gradreg_optim.zero.window`), and the step that follows, which is the engine's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from deepspeed import DeepSpeedEngine
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor

from gradreg_optim.core.plan import Plan
from gradreg_optim.core.repeatable import SameStart
from gradreg_optim.core.step import Point
from gradreg_optim.core.storage import Storage
from gradreg_optim.optimizer import GradRegOptimizer
from gradreg_optim.wrapping.groups import KEYS
from gradreg_optim.wrapping.schedule import Schedule
from gradreg_optim.wrapping.settings import DEFAULT_EPS, settings_among
from gradreg_optim.wrapping.wrapper import OptimizerWrapper
from gradreg_optim.zero.bf16 import BF16Partitions
from gradreg_optim.zero.refusals import check_engine
from gradreg_optim.zero.stage3 import Stage3Partitions
from gradreg_optim.zero.stage12 import Stage12Partitions
from gradreg_optim.zero.storage import Partitions
from gradreg_optim.zero.window import AccumulationWindow, HeldStep

ONLY_PLAIN = ("model", "scaler", "rounding")
"""Settings that the engine makes pointless: it has the model, the loss scale, and masters to round from."""


def _partitions(engine: Any) -> Partitions:
    if isinstance(engine.optimizer, BF16_Optimizer):
        return BF16Partitions(engine)
    is_stage_3 = isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3)
    return Stage3Partitions(engine) if is_stage_3 else Stage12Partitions(engine)


class ZeroGradRegOptimizer(GradRegOptimizer):
    """Gradient regularization under DeepSpeed's ZeRO stages 1, 2 and 3, with everything sharded that DeepSpeed shards.

    Args:
        engine: what ``deepspeed.initialize`` returned. Its client optimizer, stage, precision, clipping, loss scaling and
            LR scheduler work as ever; ``gradient_clipping`` acts on the combined gradient.
        strength: as in :class:`~gradreg_optim.GradRegOptimizer`, as are ``eps``, ``radius``, ``warmup_steps``,
            ``schedule``, ``schedule_steps``, ``g1_clip``, ``g2_clip``, ``max_penalty_ratio``, ``method``
            (``"forward"`` or ``"central"``), ``check_every``, ``shrink``, ``every``, ``fraction``, ``exclude`` and
            ``resample``. The parameter names are those of ``engine.module``.

    Raises:
        TypeError: ``engine`` is no DeepSpeed engine.
        ValueError: the engine keeps its weights or gradients where a second gradient cannot be taken (no ZeRO stage,
            pipeline, experts, NVMe, …), or a setting breaks its rule.

    Memory beyond plain DeepSpeed: the first gradient, one partition in the dtype in which gradients are accumulated, that
    is 4/N bytes per fp32 and 2/N per bit16 parameter on N ranks.

    Communication beyond two backward passes and one step: two all_reduces of a few fp32 scalars (norms, before and after
    the second pass), and that of :class:`~gradreg_optim.zero.gathered.GatheredPartitions` (stages 1 and 2),
    :class:`~gradreg_optim.zero.bf16.BF16Partitions` or :class:`~gradreg_optim.zero.stage3.Stage3Partitions`.

    The perturbed weights are round(fp32 master + ε·d). The masters are not written before the engine's own step, whose
    copy from them brings the weights back.

    Example::

        engine, *_ = deepspeed.initialize(model=model, optimizer=AdamW(model.parameters()), config=config)
        optimizer = ZeroGradRegOptimizer(engine, strength=1e-2, eps=1e-3)

        def closure():                       # the usual inner loop over one accumulation window
            for batch in micro_batches:
                loss = engine(batch)
                engine.backward(loss)
                engine.step()
            return loss

        optimizer.step(closure)              # runs it twice, takes exactly one engine step

    In a loop of your own, the body of ``for _ in optimizer.passes():`` is that inner loop; the engine's step is taken at the
    end of the loop. With ``fraction``, ``step`` takes :class:`~gradreg_optim.MicroBatches`, whose ``backward(batch)`` is the
    body of the inner loop.
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        *,
        strength: float = 1e-3,
        eps: float = DEFAULT_EPS,
        radius: float | None = None,
        warmup_steps: int = 0,
        schedule: str | Schedule | None = None,
        schedule_steps: int | None = None,
        g1_clip: float | None = 10.0,
        g2_clip: float | None = 10.0,
        max_penalty_ratio: float | None = None,
        method: str = "forward",
        check_every: int | None = None,
        shrink: bool = True,
        every: int = 1,
        fraction: float = 1.0,
        exclude: str | Iterable[str] = (),
        resample: str = "reuse",
    ) -> None:
        settings = settings_among(locals())
        check_engine(engine)
        if method == "exact":
            raise ValueError(
                "method='exact': no second derivatives are taken of weights that DeepSpeed partitions and of gradients "
                "that it reduces by hooks of its own. Use method='forward', or method='central' for more accuracy."
            )
        zero = engine.optimizer
        if isinstance(zero.optimizer, OptimizerWrapper):  # the phases are this object's now; the groups stay shared
            zero.optimizer = engine.basic_optimizer = zero.optimizer.optimizer
        self._engine = engine
        self._storage = _partitions(engine)
        self.held_step = HeldStep(engine)
        self._is_stepping = False
        named_groups = self._storage.named_groups
        self._set_up(zero.optimizer, settings, exclude=exclude, model=engine.module, named_groups=named_groups)

    @classmethod
    def taking_over(
        cls, engine: DeepSpeedEngine, wrapper: GradRegOptimizer | None, settings: dict[str, Any], excluded: Iterable[Tensor]
    ) -> ZeroGradRegOptimizer:
        """The optimizer of an engine that a trainer drives, with everything that ``wrapper`` was told, or ``settings``.

        It becomes the engine's client optimizer, so that whoever looks for the wrapper finds it. ``excluded`` are the
        parameters that the wrapper leaves out: its groups do not hold the model's parameters any more.
        """
        told: list[dict[str, Any]] = []
        if wrapper is not None:
            settings = {**wrapper._settings, "schedule": wrapper._schedule or wrapper._settings["schedule"]}
            told = [{key: group[key] for key in KEYS} for group in wrapper.param_groups]
        optimizer = cls(engine, **{name: value for name, value in settings.items() if name not in ONLY_PLAIN})
        optimizer.exclude = optimizer.exclude if wrapper is None else wrapper.exclude
        for group, values in zip(optimizer.param_groups, told, strict=False):
            group.update(values)
        optimizer._excluded = optimizer._excluded if wrapper is None else [[] for _ in optimizer.param_groups]
        excluded = list(excluded)
        if excluded:
            optimizer.leave_out(excluded)
        engine.optimizer.optimizer = engine.basic_optimizer = optimizer
        return optimizer

    # What the engine does differently.

    def storage(self) -> Partitions:
        """The engine's partitions."""
        return self._storage

    def surroundings(self, storage: Storage, plan: Plan) -> Callable[[Point], AbstractContextManager[Any]]:
        """An accumulation window around each pass; the engine clears gradients itself."""
        same_start = SameStart(storage.devices, self._model, nullcontext())
        return AccumulationWindow(self._storage, self.held_step, same_start)

    def _base_step(self) -> None:
        """The engine's step, which was held back, on its combined gradient."""
        self._is_stepping = True
        try:
            self.held_step.take()
        finally:
            self._is_stepping = False
        if self._storage.is_moved and not self._engine.was_step_applied():  # an overflow: the masters were not copied
            self._storage.restore()
        self._storage.is_moved = False
        self._advance()

    def _end_loop(self) -> None:
        """Take the engine's step, which the body asked for; a ``step()`` after the loop, as elsewhere, does nothing."""
        self._base_step()
        self._pending = _nothing

    def _step_on_gradients(self, was_under_way: bool) -> None:
        if self._is_stepping:  # the engine's own step, which calls its client optimizer once per group
            self.optimizer.step()
        else:
            super()._step_on_gradients(was_under_way)

    def finish_window(self) -> None:
        """Take the engine's step that was held back while a trainer ran the window."""
        if self._attachment is not None:
            self._attachment.check_consulted()
        self._base_step()


def _nothing() -> None:
    """What is left to do for a step that was taken."""
