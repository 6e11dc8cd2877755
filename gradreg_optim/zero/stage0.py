"""ZeRO stage 0: every rank holds all weights, and the engine averages gradients in ``.grad``."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from gradreg_optim.core.local import LocalStorage
from gradreg_optim.zero.storage import Partitions

PRIVATE = ("fp16_groups", "loss_scale", "optimizer")  # of FP16_Optimizer and FP16_UnfusedOptimizer, which serve bf16


class WholeGradients(LocalStorage):
    """The storage of one step on an engine of stage 0.

    θ and θ' are the model's weights. In bf16 DeepSpeed keeps fp32 masters beside them, to which only the engine's step
    writes. Communication: none, since all ranks hold the same averaged gradient, and do the same with it, bit for bit.
    """

    is_moved = False  # after a pass the weights are at θ again
    begin_window, announce = Partitions.begin_window, Partitions.announce

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.sums_announced = 0
        self.replicas = [(engine.seq_data_parallel_group, engine.device)]
        super().__init__(self.named_groups())

    def named_groups(self) -> list[dict[str, Any]]:
        """The model's parameters, as parameter groups. In bf16 the optimizer's own groups hold masters."""
        optimizer = self.engine.optimizer
        if isinstance(optimizer, Optimizer):
            return optimizer.param_groups
        return [{"params": parameters} for parameters in optimizer.fp16_groups]

    def restore(self) -> None:
        """Nothing to do: no pass leaves the weights at θ'."""
