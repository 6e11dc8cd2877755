"""DeepSpeed's engines: which ones are refused, and how one of their accumulation windows becomes a pass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from deepspeed import DeepSpeedEngine
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch.optim import Optimizer

from gradreg_optim.core.step import Point

# fmt: off
PROBLEMS = (
    (lambda engine: isinstance(engine, PipelineEngine),
     "pipeline parallelism: train_batch() runs whole steps, and no closure. Use ZeRO without a pipeline."),
    (lambda engine: engine.zenflow,
     "ZenFlow: it updates selected columns between steps, so the passes have no common θ. Remove zenflow."),
    (lambda engine: not engine.zero_optimization() and getattr(engine.optimizer, "loss_scale", 1.0) != 1.0,
     "a loss scale of {scale:g} in stage 0: DeepSpeed (0.18 and 0.19) does not multiply the loss by it, but "
     "its step divides gradients by it. Use stage 1, 2 or 3, or bf16 with deepspeed 0.19."),
    (lambda engine: not isinstance(engine.optimizer, (
        Optimizer, FP16_Optimizer, FP16_UnfusedOptimizer,  # stage 0
        DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3, BF16_Optimizer)),
     "{optimizer}: it is not known where its gradients are. Give deepspeed.initialize an optimizer."),
    (lambda engine: engine.has_moe_layers,
     "mixture of experts: norms are not summed over the experts' own process groups. Use a dense model."),
    (lambda engine: not getattr(engine, "managed_gradient_accumulation", lambda: True)(),  # 0.18: always
     "managed_gradient_accumulation=false: gradients are complete in engine.step() alone. Set it to true."),
    (lambda engine: getattr(engine, "mics_shard_size", int)() > 0,  # deepspeed 0.18 has it, 0.19 does not
     "MiCS (mics_shard_size): norms would add up several copies of the model. Remove mics_shard_size."),
    (lambda engine: engine.zero_hpz_partition_size() > 1,
     "zero_hpz_partition_size (ZeRO++): its second copy of the weights would stay at θ. Set it to 1."),
    (lambda engine: any(getattr(config, "device", None) == "nvme"
                        for config in (engine.zero_offload_optimizer(), engine.zero_offload_param())),
     "NVMe offload: masters and gradients are on disk between the passes. Offload to the CPU."),
    (lambda engine: getattr(engine.optimizer, "torch_autocast_gradscaler", None)
                    or getattr(engine, "torch_autocast_z0_gradscaler", None),
     "torch_autocast with float16: its GradScaler is stepped once per group and cannot take two gradients of "
     "one scale. Use bfloat16, or DeepSpeed's fp16."),
    (lambda engine: engine.zero_optimization() and "Muon" in type(engine.optimizer.optimizer).__name__,
     "Muon: DeepSpeed turns gradients into updates before they can be combined. Use another optimizer."),
    (lambda engine: any(getattr(engine.mpu, f"get_{kind}_parallel_world_size", int)() > 1
                        for kind in ("tensor_model", "model")),
     "tensor parallelism: norms would count replicated parameters once per rank. Use data parallelism."),
)
# fmt: on
"""What is refused, with reason and remedy: what would be wrong unseen, or would fail in the middle of a step.

The first condition that holds counts, and each relies on those before it.
"""


def check_engine(engine: Any) -> None:
    """Raise ``TypeError`` for what is no engine of DeepSpeed, ``ValueError`` for one that is refused."""
    if not isinstance(engine, DeepSpeedEngine):
        raise TypeError(
            f"engine={type(engine).__name__}: ZeroGradRegOptimizer works on a DeepSpeed engine, the first "
            "value that deepspeed.initialize returns. Without DeepSpeed, use GradRegOptimizer."
        )
    for problem in (text for is_met, text in PROBLEMS if is_met(engine)):
        scale = getattr(engine.optimizer, "loss_scale", 1.0)
        reason = problem.format(optimizer=type(engine.optimizer).__name__, scale=scale)
        raise ValueError(f"engine: ZeroGradRegOptimizer does not support {reason}")


class HeldStep:
    """Holds back the engine's step; ``take()`` runs the one that was held back last."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.take: Callable[[], Any] = engine.step

    @contextmanager
    def held_back(self) -> Iterator[list[Callable[[], Any]]]:
        """Inside the block ``engine.step`` at the end of a window only adds itself to the yielded list."""
        engine, step = self._engine, self._engine.step
        held: list[Callable[[], Any]] = []

        @functools.wraps(step)
        def held_step(*args: Any, **kwargs: Any) -> None:
            if engine.is_gradient_accumulation_boundary():
                held.append(functools.partial(step, *args, **kwargs))
            else:
                step(*args, **kwargs)

        engine.step = held_step
        try:
            yield held
        finally:
            del engine.step
        if held:
            self.take = held[0]

    @contextmanager
    def repeated(self, first_micro_step: int | None = None) -> Iterator[None]:
        """Inside the block the engine counts from ``first_micro_step``; afterwards as if it had not run."""
        engine, timer = self._engine, vars(self._engine.tput_timer)
        before, end = dict(timer), engine.micro_steps
        engine.micro_steps = end if first_micro_step is None else first_micro_step
        try:
            with self.held_back():
                yield
        finally:
            engine.micro_steps = end
            timer.update(before)
            # A trainer sets the boundary by hand. A block that raised may not have come to its own.
            if not engine.is_gradient_accumulation_boundary():
                engine.set_gradient_accumulation_boundary(True)


@contextmanager
def at_boundary(engine: Any) -> Iterator[None]:
    """Let the engine take each backward in the block for the last one of a window, after which it reduces."""
    before = engine._is_gradient_accumulation_boundary
    engine.set_gradient_accumulation_boundary(True)
    try:
        yield
    finally:
        engine.set_gradient_accumulation_boundary(before)


def accumulation_windows(
    engine: Any,
    held_step: HeldStep,
    around: Callable[[Point], AbstractContextManager[Any]],
    *,
    is_apart: bool,
) -> Callable[[Point], AbstractContextManager[None]]:
    """The context of each pass of one step: all passes start from the engine's counters as they are now.

    ``is_apart``: a pass covers one micro-batch, after which the engine reduces gradients.

    Raises:
        RuntimeError: at the end of the first pass, if it was not one window.
    """
    first_micro_step = engine.micro_steps

    @contextmanager
    def window(point: Point) -> Iterator[None]:
        with around(point), at_boundary(engine) if is_apart else nullcontext():
            if point is not Point.THETA:
                with held_step.repeated(first_micro_step):
                    yield
                return
            engine.micro_steps = first_micro_step  # θ may come twice
            with held_step.held_back() as held:
                yield
            if len(held) != 1:
                raise RuntimeError(
                    f"The closure ran {len(held)} accumulation windows to their end, but a step needs one. "
                    "Run engine(...), engine.backward(loss) and engine.step() on "
                    f"{engine.gradient_accumulation_steps()} micro-batches (gradient_accumulation_steps)."
                )

    return window
