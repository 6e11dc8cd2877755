"""DeepSpeed engines that cannot be regularized, each with the reason and a way out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer


def check_engine(engine: Any) -> None:
    """Refuse what cannot be regularized, before anything is changed.

    Raises:
        TypeError: ``engine`` is no DeepSpeed engine.
        ValueError: it is one that keeps weights or gradients where a second gradient cannot be taken.
    """
    if not isinstance(engine, DeepSpeedEngine):
        raise TypeError(
            f"engine={type(engine).__name__}: ZeroGradRegOptimizer works on a DeepSpeed engine, the first thing that "
            "deepspeed.initialize returns. Without DeepSpeed, use GradRegOptimizer."
        )
    for found, what, why in _refusals(engine):
        if found:
            raise ValueError(f"engine: {what} is not supported: {why}")


def _refusals(engine: DeepSpeedEngine) -> Iterator[tuple[bool, str, str]]:
    """Conditions that exclude an engine, with name and reason; in this order, since later ones build on earlier ones."""
    yield (
        isinstance(engine, PipelineEngine),
        "pipeline parallelism",
        "its train_batch runs forward, backward and step by itself and takes no closure. Use ZeRO without a pipeline.",
    )
    yield (
        engine.zero_optimization_stage() == 0,
        "ZeRO stage 0",
        "there are no partitions. Set zero_optimization.stage to 1, 2 or 3, or use GradRegOptimizer without DeepSpeed.",
    )
    yield (
        bool(engine.zenflow),
        "ZenFlow",
        "it applies gradients to selected columns between steps, so that no point θ has one gradient. Remove zenflow.",
    )
    zero = engine.optimizer
    kind = type(zero).__name__
    yield (
        not isinstance(zero, (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3, BF16_Optimizer)),
        kind,
        "gradients are not partitioned there. Give deepspeed.initialize an optimizer.",
    )
    yield (
        isinstance(zero, BF16_Optimizer) and not zero.immediate_grad_update and _reduces_too_early(),
        "BF16_Optimizer without immediate_grad_update in deepspeed before 0.19",
        "it averages gradients over ranks before those of the last micro-batch are in. "
        "Set bf16.immediate_grad_update to true, or leave data_types.grad_accum_dtype at its default.",
    )
    yield (
        bool(engine.has_moe_layers),
        "mixture of experts",
        "experts have process groups of their own, over which norms are not summed. Use a dense model.",
    )
    yield (
        not getattr(engine, "managed_gradient_accumulation", lambda: True)(),  # deepspeed 0.18 knows no other
        "managed_gradient_accumulation=false",
        "gradients are complete only inside engine.step(). Leave it at true.",
    )
    yield (
        getattr(engine, "mics_shard_size", int)() > 0,  # deepspeed 0.18 has it, 0.19 not any more
        "MiCS (mics_shard_size)",
        "its partitions are spread over a part of the ranks, and norms are summed over all. Remove mics_shard_size.",
    )
    yield (
        engine.zero_hpz_partition_size() > 1,
        "zero_hpz_partition_size (ZeRO++)",
        "its second partition of the weights would still hold θ at θ'. Set it to 1.",
    )
    yield (
        bool(engine.zero_quantized_weights()),
        "zero_quantized_weights (ZeRO++)",
        "a step to θ' is far below the spacing of quantized weights. Set it to false.",
    )
    offload = [engine.zero_offload_optimizer(), engine.zero_offload_param()]
    yield (
        any(config is not None and str(getattr(config.device, "value", config.device)) == "nvme" for config in offload),
        "NVMe offload",
        "masters and gradients are on disk between the passes. Offload to the CPU.",
    )
    yield (
        getattr(zero, "torch_autocast_gradscaler", None) is not None,
        "torch_autocast with float16",
        "its GradScaler is stepped once per group and cannot take two gradients of one scale. Use bfloat16, or fp16.",
    )
    yield (
        "muon" in type(zero.optimizer).__name__.lower(),
        "Muon",
        "DeepSpeed turns gradients into Muon updates before they can be combined. Use another optimizer.",
    )
    yield (
        getattr(zero, "model_parallel_group", None) is not None and dist.get_world_size(zero.model_parallel_group) > 1,
        "tensor parallelism",
        "replicated parameters would be counted once per rank in every norm. Use data parallelism.",
    )


def _reduces_too_early() -> bool:
    """DeepSpeed's pull request 7985 put backward_epilogue before the reduction. Goes with deepspeed 0.18."""
    return tuple(map(int, deepspeed.__version__.split(".")[:2])) < (0, 19)
