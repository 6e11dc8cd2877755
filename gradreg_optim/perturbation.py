"""The second point: go to θ' = θ + ε·d, run there, come back by copy.

Whatever the second pass does, three things are as if it had never run: the weights (bit for bit), the random number
generators, and the running statistics of BatchNorm.
"""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import register_module_forward_pre_hook

from gradreg_optim.finite_difference import Scalar, fused, save_and_shift_, shift_

__all__ = ["RandomState", "batch_norm_statistics_kept", "shifted"]


@contextmanager
def shifted(
    weights: Sequence[Sequence[Tensor]],
    direction: Sequence[Sequence[Tensor]],
    eps: Sequence[Scalar],
    *,
    seed: int | None = None,
) -> Iterator[list[list[Tensor]]]:
    """The weights, moved to θ + ε·d inside the block and copied back on the way out, however it is left.

    Args:
        weights: θ, one list of tensors a parameter group.
        direction: d, tensors of the same shapes.
        eps: ε of each group.
        seed: for stochastic rounding of bfloat16 weights; ``None`` rounds to nearest. Replicas need the same one.

    Yields:
        The copies of θ that will be written back; treat them as read-only.
    """
    backup: list[list[Tensor]] = []
    try:
        for number, (group, along, step) in enumerate(zip(weights, direction, eps, strict=True)):
            if fused(step, group, along):
                backup.append(save_and_shift_(group, along, eps=float(step)))
                continue
            backup.append([weight.clone() for weight in group])
            if group:
                generator = None if seed is None else torch.Generator(group[0].device).manual_seed((seed << 16) + number)
                shift_(group, along, eps=step, generator=generator)
        torch.clear_autocast_cache()  # inside an autocast block around both passes, bf16 copies of θ would be used again
        yield backup
    finally:
        for group, saved in zip(weights, backup, strict=False):  # fewer if a copy could not be had
            if group:
                torch._foreach_copy_(list(group), saved)
        torch.clear_autocast_cache()


class RandomState:
    """The state of every generator a loss may draw from: Python's, NumPy's (if loaded), torch's on CPU and devices.

    Both gradients have to see the same dropout masks: otherwise (g2 − g1)/ε measures dropout noise divided by ε.
    """

    def __init__(self, devices: Iterable[torch.device] = ()) -> None:
        """Record the generators of the host and of ``devices``."""
        self._devices = {device for device in devices if device.type not in ("cpu", "meta")}
        self._restorers: list[Callable[[], object]] = []
        self._keep(random.getstate(), random.setstate)
        if "numpy" in sys.modules:
            numpy_random = sys.modules["numpy"].random
            self._keep(numpy_random.get_state(), numpy_random.set_state)
        self._keep(torch.get_rng_state(), torch.set_rng_state)
        for device in self._devices:
            module = torch.get_device_module(device)
            self._keep(module.get_rng_state(device), partial(module.set_rng_state, device=device))

    def _keep(self, state: object, restore: Callable[[Any], object]) -> None:
        self._restorers.append(partial(restore, state))

    def restore(self) -> None:
        """Put every generator back to the recorded state."""
        for restore in self._restorers:
            restore()

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Run the block from the recorded state; afterwards the generators stand where they stood before it."""
        after = RandomState(self._devices)
        self.restore()
        try:
            yield
        finally:
            after.restore()


@contextmanager
def batch_norm_statistics_kept(model: nn.Module | None = None) -> Iterator[None]:
    """Leave the running statistics of every BatchNorm layer as they are before the block.

    Without a ``model`` to look into, a module hook finds the layers when they, or a module around them, are first called
    inside the block (a compiled module calls no hooks of its parts, hence the look at everything below each one).
    """
    statistics: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}

    def record(module: nn.Module, _inputs: object = None) -> None:
        if module not in statistics:
            for part in module.modules():
                moving = list(part.buffers(recurse=False)) if isinstance(part, _NormBase) else []
                statistics.setdefault(part, [(buffer, buffer.clone()) for buffer in moving])

    with ExitStack() as finding:
        if model is not None:
            record(model)
        else:
            if "torch._dynamo" in sys.modules:
                # A compiled module warns that hooks are called on its wrapper too: ``record`` looks once at each module.
                finding.enter_context(warnings.catch_warnings())
                warnings.filterwarnings("ignore", r"Using `torch\.compile\(module\)` when there are global hooks")
            finding.callback(register_module_forward_pre_hook(record).remove)
        try:
            yield
        finally:
            for buffer, saved in (pair for pairs in statistics.values() for pair in pairs):
                buffer.copy_(saved)
