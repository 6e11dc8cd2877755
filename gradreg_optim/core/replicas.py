"""Replicas of a model under DistributedDataParallel, whose reduction waits for the end of a step.

The norm of a micro-batch is that of a rank's own gradient. So no pass reduces, and the combined gradients are
reduced once, through the buckets and communication hooks of DistributedDataParallel itself: what is sent is
what a plain step sends. FSDP2 reduces in each pass, because a rank has no room for a whole gradient; there
the micro-batch is that of all ranks.

Relied upon (torch 2.6 to 2.15): ``require_backward_grad_sync`` and ``reducer.prepare_for_backward`` of
DistributedDataParallel. A backward that begins at parameters runs the hooks that its forward's would run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from gradreg_optim.core.step import OfOneOptimizer


class Replicas(OfOneOptimizer):
    """The modules that have run in a pass without a reduction, and whether they would have made one."""

    def __init__(self) -> None:
        self.waiting: dict[DistributedDataParallel, bool] = {}

    @contextmanager
    def unreduced(self) -> Iterator[None]:
        """Around a pass: FSDP2 reduces, and DistributedDataParallel only where it has to."""
        if not has_ranks():
            yield
            return
        with ExitStack() as stack:

            def hold(module: nn.Module, _inputs: object) -> None:
                if isinstance(module, FSDPModule):
                    module.set_requires_gradient_sync(True)
                elif isinstance(module, DistributedDataParallel):
                    # A loop or a trainer may have switched the reduction off, but for the last micro-batch.
                    reduces, waits = module.require_backward_grad_sync, can_wait(module)
                    stack.callback(setattr, module, "require_backward_grad_sync", reduces)
                    module.require_backward_grad_sync = not waits
                    if waits:
                        self.waiting[module] = reduces or self.waiting.get(module, False)

            stack.callback(register_module_forward_pre_hook(hold).remove)
            yield

    def sum(self, values: Tensor) -> Tensor:
        """``values``, added up over the ranks that wait. Communication: one all_reduce."""
        for module in self.waiting:
            values = values.to(module.device, torch.float32)
            distributed.all_reduce(values, group=module.process_group)
        return values

    def reduce(self) -> None:
        """Average what is in ``.grad`` over the ranks, as the backward of a plain step does.

        A parameter that no rank has reached keeps no gradient; if DistributedDataParallel looks for such
        (``find_unused_parameters``), it costs one all_reduce of a byte a parameter, as in a plain step.
        """
        for module in (module for module, would_reduce in self.waiting.items() if would_reduce):
            names = module.module.named_parameters()
            parameters = [
                p for name, p in names if p.requires_grad and name not in module.parameters_to_ignore
            ]
            is_reached = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
            if module.find_unused_parameters:
                is_reached = is_reached.to(module.device)
                distributed.all_reduce(is_reached, distributed.ReduceOp.MAX, module.process_group)
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            hooks = [p._backward_hooks for p in parameters]
            for parameter in parameters:  # the passes have run hooks of parameters
                parameter.grad = parameter._backward_hooks = None
            try:
                with torch.enable_grad():  # the reducer follows the graph from outputs to parameters
                    outputs = [parameter.view_as(parameter) for parameter in parameters]
                module.reducer.prepare_for_backward(outputs)
                torch.autograd.backward(outputs, gradients)
            finally:
                for parameter, hook in zip(parameters, hooks, strict=True):
                    parameter._backward_hooks = hook
            for parameter, reached in zip(parameters, is_reached.tolist(), strict=True):
                if module.find_unused_parameters and not reached:
                    parameter.grad = None
        self.waiting.clear()


@dataclass(frozen=True)
class Part:
    """The micro-batch ``number`` of the ``of`` that a step has, and the replicas that wait for the last one.

    ``is_apart``: a norm is that of its own gradient. ``may_be_empty``: another one has a gradient, or may.
    """

    number: int = 0
    of: int = 1
    is_apart: bool = False
    may_be_empty: bool = False
    replicas: Replicas = field(default_factory=Replicas)


WHOLE = Part()
"""All of a step."""


def has_ranks() -> bool:
    """Whether processes work together."""
    return distributed.is_available() and distributed.is_initialized()


def can_wait(module: DistributedDataParallel) -> bool:
    """Whether ``module`` need not reduce in each pass.

    With SyncBatchNorm a pass needs all ranks, so that all have to take the same ones. A static graph is
    recorded in a first iteration that reduces.
    """
    has_common_batches = any(isinstance(part, nn.SyncBatchNorm) for part in module.modules())
    return not module.static_graph and not has_common_batches
