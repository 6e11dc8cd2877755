"""Makes a pass repeatable: it starts from the same random numbers and buffers, and from no gradients.

Both gradients have to see the same dropout masks: otherwise (g2 − g1)/ε measures dropout noise divided by ε. The running
statistics of BatchNorm move once a step.
"""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import register_module_forward_pre_hook

from gradreg_optim.core.local import real
from gradreg_optim.core.step import Point


class SameStart:
    """Around each pass of one step: all start where the first did, and all but the first leave things as they found them.

    Args:
        devices: those whose random numbers a loss may draw.
        model: where BatchNorm layers are found; ``None``: by a module hook.
        first: what is around the first pass.
    """

    def __init__(
        self, devices: Iterable[torch.device], model: nn.Module | None, first: AbstractContextManager[None]
    ) -> None:
        self._model = model
        self._first = first
        self._start = RandomState(devices)

    @contextmanager
    def __call__(self, point: Point) -> Iterator[None]:
        """Run the block, which is the pass at ``point``."""
        if point is Point.THETA:
            with self._first:
                yield
        else:
            with self._start.replayed(), batch_norm_statistics_kept(self._model):
                yield


class RandomState:
    """The state of every generator a loss may draw from: Python's, NumPy's (if loaded), torch's on CPU and devices."""

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


class Clearing:
    """Notices a first pass that adds to gradients from before instead of clearing them, until it has seen one clear.

    Such a pass (of Lightning, with ``accumulate_grad_batches``) covers all of a step's micro-batches, and the second one
    only its own. One gradient is compared with what it was, when the first backward that reaches it begins.
    """

    def __init__(self) -> None:
        self._is_seen = False

    @contextmanager
    def required(self, parameters: Iterable[Tensor]) -> Iterator[None]:
        """Run the block, which is a first pass.

        Raises:
            RuntimeError: the gradients were not cleared.
        """
        candidates = [] if self._is_seen else [p for p in parameters if p.requires_grad and _is_dense(p.grad)]
        parameter: Any = next((p for p in sorted(candidates, key=Tensor.numel) if bool(real(p.grad).any())), None)  # type: ignore[arg-type]
        if parameter is None:
            yield
            return
        before, was_cleared, backward = real(parameter.grad).clone(), [], torch.autograd.backward

        def is_as_before() -> bool:
            return parameter.grad is not None and torch.equal(real(parameter.grad), before)

        def compare(*args: Any, **kwargs: Any) -> None:
            torch.autograd.backward = backward
            is_uncleared = is_as_before()
            backward(*args, **kwargs)
            if is_uncleared and is_as_before():  # the backward of something else
                torch.autograd.backward = compare
            else:
                was_cleared.append(not is_uncleared)

        torch.autograd.backward = compare
        try:
            yield
        finally:
            torch.autograd.backward = backward
        if was_cleared and not was_cleared[0]:
            raise RuntimeError(
                "The closure added to gradients from before it was called: its second call would lack them. Clear gradients "
                "in the closure and run all micro-batches of the step in it (in Lightning, by manual optimization instead "
                "of accumulate_grad_batches)."
            )
        self._is_seen = bool(was_cleared)


def _is_dense(gradient: Tensor | None) -> bool:
    return gradient is not None and gradient.layout is torch.strided
