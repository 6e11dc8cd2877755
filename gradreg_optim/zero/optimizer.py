"""ZeroGradRegOptimizer: the regularized step on the partitions of DeepSpeed's ZeRO optimizers.

    first gradient → direction (mask, clip) → shift → second gradient → (restore) → combine → one engine step

The phases are :class:`~gradreg_optim.GradRegOptimizer`'s. Overridden is where gradients and weights live
(:mod:`gradreg_optim.zero.partitions`), how sums run over ranks, and what a closure is: DeepSpeed's inner loop over one
accumulation window, which has an ``engine.step()`` in it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor

from gradreg_optim.config import DEFAULT_CLIP, DEFAULT_EPS
from gradreg_optim.fraction import MicroBatches
from gradreg_optim.gradients import FirstGradient, Share
from gradreg_optim.optimizer import GradRegOptimizer
from gradreg_optim.phases import WHOLE
from gradreg_optim.schedule import Schedule
from gradreg_optim.wrapper import OptimizerWrapper
from gradreg_optim.zero.bf16 import BF16Partitions
from gradreg_optim.zero.partitions import Partitions
from gradreg_optim.zero.refusals import check_engine
from gradreg_optim.zero.stage3 import Stage3Partitions
from gradreg_optim.zero.stage12 import Stage12Partitions
from gradreg_optim.zero.window import AccumulationWindow

__all__ = ["ZeroGradRegOptimizer"]


ONLY_PLAIN = ("model", "scaler", "rounding", "memory")
"""Settings that the engine makes pointless: it has the model, the loss scale, and masters to round from."""


def _partitions(zero: Any) -> Partitions:
    if isinstance(zero, BF16_Optimizer):
        return BF16Partitions(zero)
    return Stage3Partitions(zero) if isinstance(zero, DeepSpeedZeroOptimizer_Stage3) else Stage12Partitions(zero)


class ZeroGradRegOptimizer(GradRegOptimizer):
    """Gradient regularization under DeepSpeed's ZeRO stages 1, 2 and 3, with everything sharded that DeepSpeed shards.

    Args:
        engine: what ``deepspeed.initialize`` returned. Its client optimizer, stage, precision, clipping, loss scaling and
            LR scheduler work as ever; ``gradient_clipping`` acts on the combined gradient.
        strength: as in :class:`~gradreg_optim.GradRegOptimizer`, as are ``eps``, ``radius``, ``warmup_steps``,
            ``schedule``, ``schedule_steps``, ``g1_clip``, ``g2_clip``, ``max_penalty_ratio``, ``method``
            (``"forward"`` or ``"central"``), ``check_every``, ``shrink``, ``every``, ``between`` (``"plain"``),
            ``fraction``, ``exclude`` and ``resample``. The parameter names are those of ``engine.module``.

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

    With ``fraction``, ``step`` takes :class:`~gradreg_optim.MicroBatches`; its ``backward(batch)`` is that loop's body.
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
        g2_clip: float | None = DEFAULT_CLIP,
        max_penalty_ratio: float | None = None,
        method: str = "forward",
        check_every: int | None = None,
        shrink: bool = True,
        every: int = 1,
        between: str = "plain",
        fraction: float = 1.0,
        exclude: str | Iterable[str] = (),
        resample: str = "reuse",
    ) -> None:
        check_engine(engine)
        if method == "exact":
            raise ValueError(
                "method='exact': no second derivatives are taken of weights that DeepSpeed partitions and of gradients "
                "that it reduces by hooks of its own. Use method='forward', or method='central' for more accuracy."
            )
        if between == "reuse":
            raise ValueError(
                "between='reuse': the last penalty would have to be kept and saved in DeepSpeed's partitions: it is not. "
                "Use between='plain', with a strength that is higher by as much as steps are rarer."
            )
        zero = engine.optimizer
        if isinstance(zero.optimizer, OptimizerWrapper):  # the phases are this object's now; the groups stay shared
            zero.optimizer = engine.basic_optimizer = zero.optimizer.optimizer
        self._engine = engine
        self._partitions = _partitions(zero)
        super().__init__(
            zero.optimizer,
            strength=strength,
            eps=eps,
            radius=radius,
            warmup_steps=warmup_steps,
            schedule=schedule,
            schedule_steps=schedule_steps,
            g1_clip=g1_clip,
            g2_clip=g2_clip,
            max_penalty_ratio=max_penalty_ratio,
            method=method,
            check_every=check_every,
            shrink=shrink,
            every=every,
            between=between,
            fraction=fraction,
            exclude=exclude,
            resample=resample,
            model=engine.module,
        )
        self._note_excluded()
        self._final_step: Callable[[], Any] = engine.step
        self._stepping = False
        self._shifted = False

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
            settings["resample"] = wrapper.resample
            told = [{key: group[key] for key in group if key.startswith("gradreg_")} for group in wrapper.param_groups]
        if settings.get("memory") == "lean":
            raise ValueError(
                "memory='lean': under ZeRO each rank keeps its partition of the first gradient only, and DeepSpeed reduces "
                "the second one into buffers of its own. Leave memory out."
            )
        optimizer = cls(engine, **{name: value for name, value in settings.items() if name not in ONLY_PLAIN})
        optimizer.exclude = optimizer.exclude if wrapper is None else wrapper.exclude
        for group, values in zip(optimizer.param_groups, told, strict=False):
            group.update(values, gradreg_excluded=[])
        excluded = list(excluded)
        if excluded:
            optimizer.leave_out(excluded)
        engine.optimizer.optimizer = engine.basic_optimizer = optimizer
        return optimizer

    # Steps on micro-batches: the engine is told where gradients have to be complete.

    def _step_in_parts(self, micro_batches: MicroBatches) -> Any:
        count, needed = len(micro_batches.batches), self._engine.gradient_accumulation_steps()
        if count != needed:
            raise RuntimeError(
                f"MicroBatches holds {count} micro-batches, and the engine accumulates {needed} "
                "(gradient_accumulation_steps), by which it divides the loss. Give it as many."
            )
        before = self._engine._is_gradient_accumulation_boundary
        try:
            return super()._step_in_parts(micro_batches)
        finally:
            self._engine.set_gradient_accumulation_boundary(before)

    def _first_window(self, micro_batches: MicroBatches, reduced: Callable[[int], bool], *notes: Any) -> Any:
        with self.held_back() as held:
            loss = super()._first_window(micro_batches, reduced, *notes)
        if len(held) != sum(map(reduced, range(len(micro_batches.batches)))):
            raise RuntimeError(
                "MicroBatches under DeepSpeed: backward(batch) did not take the engine's step. "
                "Let it run engine(...), engine.backward(loss) and engine.step(); at the end of a window it is held back."
            )
        self._engine.micro_steps += len(held) - 1  # steps that were held back and will not be made up for
        return loss

    def _run(self, micro_batches: MicroBatches, position: int, *, reduced: bool) -> Any:
        self._engine.set_gradient_accumulation_boundary(reduced)
        return super()._run(micro_batches, position, reduced=reduced)

    def _window_again(self, second_pass: Callable[[], None]) -> Callable[[], None]:
        return self.second_window()(second_pass)

    def _clear_gradients(self) -> None:
        """The engine does: after its step, and when gradients are taken."""

    def _take_stretch(self) -> list[Tensor]:
        return self._partitions.take_again()

    def _copy_stretch(self) -> list[Tensor]:
        return [gradient.clone() for gradient in self._partitions.gradients()]

    def _add_stretch(self, stretch: list[Tensor]) -> None:
        for gradient, addend in zip(self._partitions.gradients(), stretch, strict=True):
            gradient.add_(addend)

    def _added(self, total: list[Tensor], stretch: list[Tensor]) -> list[Tensor]:
        return [gradient.add_(addend) for gradient, addend in zip(total, stretch, strict=True)]

    # Parameters: the optimizer's groups hold flat partitions, names and exclusion are about the model's.

    def _parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": parameters} for parameters in self._partitions.parameters]

    def leave_out(self, parameters: Iterable[Tensor]) -> None:
        """Exclude ``parameters`` of the model as ``exclude`` does."""
        super().leave_out(parameters)
        self._note_excluded()

    def _note_excluded(self) -> None:
        # Kept here as well, because an engine's checkpoint overwrites the groups with those of the saved run.
        self._excluded: set[int] = {
            id(named["params"][position])
            for group, named in zip(self.param_groups, self._parameter_groups(), strict=True)
            for position in group["gradreg_excluded"]
        }

    def _precision_is_low(self) -> bool:
        engine: Any = self._engine
        return bool(engine.fp16_enabled() or engine.bfloat16_enabled()) or super()._precision_is_low()

    def _devices(self) -> set[torch.device]:
        return {torch.device(self._engine.device)}

    # The phases.

    def _prepared(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        return AccumulationWindow(self, super()._prepared(closure))

    def _first_call(self, closure: Callable[[], Any]) -> Any:
        return closure()  # a window of the engine, which clears gradients itself

    @contextmanager
    def held_back(self, *, counting: bool = True) -> Iterator[list[Callable[[], Any]]]:
        """Inside the block the engine's step at the end of a window does nothing but note itself in the yielded list.

        Other calls of ``engine.step`` are as ever, or, if not ``counting``, only advance to the next micro-batch.
        """
        engine, step = self._engine, self._engine.step
        held: list[Callable[[], Any]] = []

        @functools.wraps(step)
        def noted(*args: Any, **kwargs: Any) -> None:
            if engine.is_gradient_accumulation_boundary():
                held.append(functools.partial(step, *args, **kwargs))
            elif counting:
                step(*args, **kwargs)
            else:
                engine.micro_steps += 1

        engine.step = noted
        try:
            yield held
        finally:
            del engine.step
        if held:
            self._final_step = held[0]

    @contextmanager
    def second_window(self, first_micro_step: int | None = None) -> Iterator[None]:
        """Run the micro-batches of a window again: the engine counts from ``first_micro_step``, and then as before."""
        engine, timer = self._engine, vars(self._engine.tput_timer)
        before, end = dict(timer), engine.micro_steps
        engine.micro_steps = end if first_micro_step is None else first_micro_step
        try:
            with self.held_back(counting=False):
                yield
        finally:
            engine.micro_steps = end
            timer.update(before)
            if not engine.is_gradient_accumulation_boundary():  # set by hand, and the block did not get to the end
                engine.set_gradient_accumulation_boundary(True)

    def _take_gradients(self, first: FirstGradient) -> None:
        first.shares += self._empty_shares()
        for share, gradient in self._regularized(first.shares, self._partitions.take_gradients()):
            if share is not None:
                share.gradients.append(gradient)
                share.g1.append(gradient)

    def _regularized(self, shares: list[Share], tensors: list[Tensor]) -> Iterator[tuple[Share | None, Tensor]]:
        """Each fragment's tensor with the share that it belongs to; ``None`` for those that are not regularized."""
        for fragment, tensor in zip(self._partitions.fragments, tensors, strict=True):
            share = shares[fragment.group]
            yield (share if share.strength and id(fragment.parameter) not in self._excluded else None), tensor

    @contextmanager
    def _perturbed(self, first: FirstGradient, distance: float) -> Iterator[None]:
        """Write θ' into the model; it stays there until the engine's step copies the masters, or until something raises."""
        unscale = 1.0 / self._loss_scale()
        pairs = list(self._regularized(first.shares, self._partitions.first))
        steps = ((0.0, None) if share is None else (share.eps * unscale * distance, g1) for share, g1 in pairs)
        self._shifted = True
        with self._back_at_theta_if_it_raises():
            for (share, _), (arrived, sent) in zip(pairs, self._partitions.shift(steps), strict=True):
                if share is not None and distance == WHOLE:
                    share.arrived = share.arrived.to(arrived.device) + arrived * unscale
                    share.sent = share.sent.to(sent.device) + sent * unscale**2
            yield

    @contextmanager
    def _back_at_theta_if_it_raises(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            if self._shifted:
                self._shifted = False
                self._partitions.rescue()
            raise

    def _second_gradients(self, first: FirstGradient) -> list[list[Tensor]]:
        gradients = self._partitions.gradients()
        for (share, g2), g1 in zip(self._regularized(first.shares, gradients), self._partitions.first, strict=True):
            if share is None:
                g2.copy_(g1)
        return self._aligned(first, gradients)

    def _take_further(self, first: FirstGradient) -> Any:
        return self._partitions.take_again()

    def _aligned(self, first: FirstGradient, taken: Any) -> list[list[Tensor]]:
        aligned: dict[int, list[Tensor]] = {id(share): [] for share in first.shares}
        for share, gradient in self._regularized(first.shares, taken):
            if share is not None:
                aligned[id(share)].append(gradient)
        return [aligned[id(share)] for share in first.shares]

    def _combine(self, first: FirstGradient) -> None:
        with self._back_at_theta_if_it_raises():
            super()._combine(first)
            self._partitions.gradients_written()
            self._partitions.release()

    def _put_back(self, first: FirstGradient) -> None:
        if self._partitions.first:
            self._partitions.put_back()
            self._partitions.release()

    def _has_gradient(self, shares: list[Share]) -> bool:
        return True  # a rank that owns nothing has to take part all the same

    def _sum_over_ranks(self, sums: Tensor) -> Tensor:
        total = sums.to(self._engine.device, torch.float32)
        dist.all_reduce(total, group=self._partitions.zero.dp_process_group)
        return total.to("cpu" if self._partitions.offloaded else self._engine.device)

    def _step_without_closure(self) -> None:
        if self._stepping:  # the engine's own step, which calls its client optimizer once per group
            self.optimizer.step()
        else:
            super()._step_without_closure()

    @property
    def _overflow_skips_step(self) -> bool:
        return bool(self._engine.fp16_enabled())

    def _loss_scale(self) -> float:
        return self._partitions.loss_scale

    def finish_window(self) -> None:
        """Take the engine's step that was held back while a trainer ran the window."""
        if not self.regularizes:
            self._metrics = {"strength": 0.0}
        if self._attachment is not None:
            self._attachment.check_consulted()
        self._base_step()

    def _base_step(self) -> None:
        self._stepping = True
        try:
            self._final_step()
        finally:
            self._stepping = False
        if self._shifted and not self._engine.was_step_applied():  # an overflow: the engine has not copied the masters
            self._partitions.restore()
        self._shifted = False
        self._advance()
