"""Makes a pass repeatable: it starts from the same random numbers and module states, and leaves no trace of its own.

Both gradients have to see the same dropout masks: otherwise (g2 − g1)/ε measures dropout noise divided by ε. What modules
hold is put back as well (:mod:`gradreg_optim.core.module_state`). Clips of each gradient by itself would remove what the
difference of the two is to measure: those that a pass calls are held back for the combined gradient. Lightning's
``gradient_clip_val`` clips inside its closure, and many loops do in the body of ``passes()``.

Relied upon (torch 2.6 to 2.15): ``torch.nn.utils.clip_grad._get_total_norm`` and ``_clip_grads_with_norm_``, which
``clip_grad_norm_`` calls, also where it was imported by name.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.nn.utils import clip_grad

from gradreg_optim.core.module_state import ModuleState
from gradreg_optim.core.step import Point


def same_start(
    devices: Iterable[torch.device],
    model: nn.Module | None,
    state: ModuleState,
    note: Callable[[Any, Any], None],
    clips: HeldClips,
    first: Callable[[], AbstractContextManager[None]],
) -> Callable[[Point], AbstractContextManager[None]]:
    """What is around each pass of one step: all start where the first did, and all but the first leave things as they were.

    ``devices`` are those whose random numbers a loss may draw. ``model`` is a module whose parts run; others are found when
    they are called. ``note(tensors, grad_tensors)`` gets what each backward differentiates. ``clips`` holds clips back.
    ``first()`` is what else is around the first pass.
    """
    start = RandomState(devices)

    @contextmanager
    def around(point: Point) -> Iterator[None]:
        is_first = point is Point.THETA
        pending: list[Callable[[], Any]] = []

        def noted(backward: Callable[..., None], tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> None:
            clips.apply(pending)  # a backward follows them: they are part of the loss
            tensors, grad_tensors = as_tuple(tensors), as_tuple(grad_tensors)
            note(tensors, grad_tensors)
            backward(tensors, grad_tensors, *args, **kwargs)

        with ExitStack() as stack:
            if is_first:
                stack.enter_context(first())
                state.begin_first(model, stack)
            else:
                stack.callback(RandomState(devices).restore)
                stack.callback(state.put, is_before=False)
                state.put(is_before=True)
            start.restore()  # θ may come twice
            stack.enter_context(backward_replaced(noted))
            stack.enter_context(clips.held(pending))
            yield
        if is_first:
            state.end()
            clips.pending = pending

    return around


@contextmanager
def backward_replaced(stand_in: Callable[..., None]) -> Iterator[None]:
    """In the block each backward is ``stand_in(backward, …)``, but for those that it runs: reentrant checkpoints do."""
    backward = torch.autograd.backward

    def replaced(*args: Any, **kwargs: Any) -> None:
        torch.autograd.backward = backward
        try:
            stand_in(backward, *args, **kwargs)
        finally:
            torch.autograd.backward = replaced

    torch.autograd.backward = replaced
    try:
        yield
    finally:
        torch.autograd.backward = backward


def as_tuple(tensors: Any) -> Any:
    """Arguments of a backward, which may be generators, so that they can be read twice."""
    return tensors if tensors is None or isinstance(tensors, torch.Tensor) else tuple(tensors)


class HeldClips:
    """The clips that the first pass of a step ended with. Those of further passes are dropped."""

    def __init__(self) -> None:
        self.pending: list[Callable[[], Any]] = []
        self._norm_type = 2.0
        self._originals = clip_grad._get_total_norm, clip_grad._clip_grads_with_norm_, clip_grad.clip_grad_value_

    def __reduce__(self) -> Any:
        """A copy of the optimizer has clips of its own."""
        return HeldClips, ()

    def held(self, pending: list[Callable[[], Any]]) -> AbstractContextManager[Any]:
        """In the block clips are added to ``pending`` instead of being applied."""

        def note_norm(tensors: Any, norm_type: float = 2.0, *args: Any, **kwargs: Any) -> Any:
            self._norm_type = norm_type
            return self._originals[0](tensors, norm_type, *args, **kwargs)

        def hold_norm(parameters: Any, max_norm: float, _total: Any, foreach: bool | None = None) -> None:
            clip = partial(clip_grad.clip_grad_norm_, max_norm=max_norm, norm_type=self._norm_type, foreach=foreach)
            pending.append(partial(clip, _listed(parameters)))

        def hold_value(parameters: Any, *args: Any, **kwargs: Any) -> None:
            pending.append(partial(self._originals[2], _listed(parameters), *args, **kwargs))

        return self._patched(note_norm, hold_norm, hold_value)

    def apply(self, pending: list[Callable[[], Any]]) -> None:
        """Apply and forget the clips in ``pending``."""
        if pending:
            with self._patched(*self._originals):
                while pending:
                    pending.pop(0)()

    @staticmethod
    @contextmanager
    def _patched(total_norm: Any, clip_with_norm: Any, clip_value: Any) -> Iterator[None]:
        functions = {"_get_total_norm": total_norm, "_clip_grads_with_norm_": clip_with_norm}
        with patch.multiple(clip_grad, **functions), patch.object(torch.nn.utils, "clip_grad_value_", clip_value):
            yield


def _listed(parameters: Any) -> list[torch.Tensor]:
    return [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)


class RandomState:
    """The state of every generator a loss may draw from: Python's, NumPy's (if loaded), torch's on CPU and devices."""

    def __init__(self, devices: Iterable[torch.device] = ()) -> None:
        """Record the generators of the host and of ``devices``."""
        self._devices = {device for device in devices if device.type not in ("cpu", "meta")}
        states: list[tuple[Callable[[Any], object], object]] = [
            (random.setstate, random.getstate()),
            (torch.set_rng_state, torch.get_rng_state()),
        ]
        if "numpy" in sys.modules:
            of_numpy = sys.modules["numpy"].random
            states.append((of_numpy.set_state, of_numpy.get_state()))
        for device in self._devices:
            module = torch.get_device_module(device)
            states.append((partial(module.set_rng_state, device=device), module.get_rng_state(device)))
        self._restorers = [partial(restore, state) for restore, state in states]

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
