"""DeepSpeed engines that cannot be regularized, each with the reason and the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import deepspeed
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch.optim import Optimizer

SUPPORTED = (
    *(Optimizer, FP16_Optimizer, FP16_UnfusedOptimizer),  # stage 0
    *(DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3, BF16_Optimizer),
)


def check_engine(engine: Any) -> None:
    """Raise ``TypeError`` if ``engine`` is no DeepSpeed engine, and ``ValueError`` if it cannot be regularized."""
    if not isinstance(engine, DeepSpeedEngine):
        raise TypeError(
            f"engine={type(engine).__name__}: ZeroGradRegOptimizer works on a DeepSpeed engine, the first value that "
            "deepspeed.initialize returns. Without DeepSpeed, use GradRegOptimizer."
        )
    problem = next(_problems(engine), None)
    if problem is not None:
        raise ValueError(f"engine: ZeroGradRegOptimizer does not support {problem}")


def _problems(engine: DeepSpeedEngine) -> Iterator[str]:
    """Each unsupported feature with reason and remedy. Later conditions rely on earlier ones having been refused."""
    if isinstance(engine, PipelineEngine):
        yield "pipeline parallelism: train_batch() runs whole steps and takes no closure. Use ZeRO without a pipeline."
    if engine.zenflow:
        yield "ZenFlow: it updates selected columns between steps, so the passes have no common θ. Remove zenflow."
    zero = engine.optimizer
    if not engine.zero_optimization() and getattr(zero, "loss_scale", 1.0) != 1.0:
        yield (
            f"a loss scale of {zero.loss_scale:g} in stage 0: DeepSpeed (0.18 and 0.19) does not multiply the loss by it, "
            "although its step divides gradients by it. Use stage 1, 2 or 3, or bf16 with deepspeed 0.19."
        )
    if not isinstance(zero, SUPPORTED):
        yield f"{type(zero).__name__}: it is not known where its gradients are. Give deepspeed.initialize an optimizer."
    if isinstance(zero, BF16_Optimizer) and not zero.immediate_grad_update and deepspeed.__version__.startswith("0.18."):
        # Fixed by DeepSpeed's pull request 7985. Remove this with support for deepspeed 0.18.
        yield (
            "BF16_Optimizer without immediate_grad_update in deepspeed 0.18: it reduces gradients before the last "
            "micro-batch. Set bf16.immediate_grad_update to true, or leave data_types.grad_accum_dtype at its default."
        )
    if engine.has_moe_layers:
        yield "mixture of experts: norms are not summed over the experts' own process groups. Use a dense model."
    if not getattr(engine, "managed_gradient_accumulation", lambda: True)():  # deepspeed 0.18 always manages it
        yield "managed_gradient_accumulation=false: gradients are complete only inside engine.step(). Set it to true."
    if getattr(engine, "mics_shard_size", int)() > 0:  # deepspeed 0.18 has it, 0.19 does not
        yield "MiCS (mics_shard_size): norms would add up several copies of the model. Remove mics_shard_size."
    if engine.zero_hpz_partition_size() > 1:
        yield "zero_hpz_partition_size (ZeRO++): its second copy of the weights would stay at θ. Set it to 1."
    if engine.zero_quantized_weights():
        yield "zero_quantized_weights (ZeRO++): the step to θ' is far below their spacing. Set it to false."
    offload = [engine.zero_offload_optimizer(), engine.zero_offload_param()]
    if any(config is not None and str(getattr(config.device, "value", config.device)) == "nvme" for config in offload):
        yield "NVMe offload: masters and gradients are on disk between the passes. Offload to the CPU."
    scalers = getattr(zero, "torch_autocast_gradscaler", None), getattr(engine, "torch_autocast_z0_gradscaler", None)
    if any(scaler is not None for scaler in scalers):
        yield (
            "torch_autocast with float16: its GradScaler is stepped once per group and cannot take two gradients of one "
            "scale. Use bfloat16, or DeepSpeed's fp16."
        )
    if engine.zero_optimization() and "muon" in type(zero.optimizer).__name__.lower():
        yield "Muon: DeepSpeed turns gradients into updates before they can be combined. Use another optimizer."
    names = ("get_tensor_model_parallel_world_size", "get_model_parallel_world_size")
    if any(getattr(engine.mpu, name, int)() > 1 for name in names):
        yield "tensor parallelism: norms would count replicated parameters once per rank. Use data parallelism."
