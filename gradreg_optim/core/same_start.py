"""Makes a pass repeatable.

Each pass starts from the same random numbers and module states, and further passes leave no trace.

Both gradients have to see the same dropout masks: otherwise (g2 − g1)/ε measures dropout noise divided by ε.
What modules hold is put back as well (:mod:`gradreg_optim.core.module_state`). Clips of each gradient by
itself would remove what the difference of the two is to measure: those that a pass calls are held back for
the combined gradient. Lightning's ``gradient_clip_val`` clips inside its closure, and many loops do in the
body of ``passes()``.

Relied upon (torch 2.6 to 2.15): ``torch.nn.utils.clip_grad._get_total_norm`` and ``_clip_grads_with_norm_``,
which ``clip_grad_norm_`` calls, also where it was imported by name.
"""

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad

from gradreg_optim.core.local import local_shard
from gradreg_optim.core.module_state import ModuleState
from gradreg_optim.core.step import OfOneOptimizer, Point


def same_start(
    devices: Iterable[torch.device],
    model: nn.Module | None,
    state: ModuleState,
    note: Callable[[Any, Any], None],
    clips: "HeldClips",
    clearing: "Clearing",
    parameters: Callable[[], Iterable[Tensor]],
) -> Callable[[Point], AbstractContextManager[None]]:
    """The context of each pass of one step.

    All passes start from the state of the first one, and further passes restore what they found.

    ``devices`` are those whose random numbers a loss may draw. ``model`` is a module whose parts run;
    others are found when they are called. ``note(tensors, grad_tensors)`` gets what each backward
    differentiates. ``clips`` holds clips back. ``clearing`` checks that the first pass clears the gradients
    of ``parameters()``.
    """
    start = RandomState(devices)

    @contextmanager
    def around(point: Point) -> Iterator[None]:
        is_first = point is Point.THETA
        pending: list[Callable[[], Any]] = []

        def noted(
            backward: Callable[..., None], tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any
        ) -> None:
            clips.apply(pending)  # a backward follows them: they are part of the loss
            tensors, grad_tensors = as_tuple(tensors), as_tuple(grad_tensors)
            note(tensors, grad_tensors)
            with clearing.watched() if is_first else nullcontext():
                backward(tensors, grad_tensors, *args, **kwargs)

        with ExitStack() as stack:
            if not is_first:
                stack.callback(state.put, is_before=False)
                stack.callback(RandomState(devices).restore)
            elif not clearing.is_seen:
                clearing.begin(parameters())
            start.restore()  # θ may come twice
            stack.enter_context(backward_replaced(noted))
            stack.enter_context(clips.held(pending))
            if is_first:
                state.begin_first(model, stack)
            else:
                state.put(is_before=True)
            yield
        if is_first:
            state.end()
            clips.pending = pending

    return around


@contextmanager
def backward_replaced(stand_in: Callable[..., None]) -> Iterator[None]:
    """Replace each backward in the block by ``stand_in(backward, …)``.

    Backwards inside a backward, which reentrant checkpoints run, are left alone.
    """
    backward = torch.autograd.backward

    def replaced(*args: Any, **kwargs: Any) -> None:
        with patch.object(torch.autograd, "backward", backward):
            stand_in(backward, *args, **kwargs)

    with patch.object(torch.autograd, "backward", replaced):
        yield


def as_tuple(tensors: Any) -> Any:
    """Arguments of a backward, which may be generators, so that they can be read twice."""
    return tensors if tensors is None or isinstance(tensors, Tensor) else tuple(tensors)


class HeldClips(OfOneOptimizer):
    """The clips that the first pass of a step ended with. Those of further passes are dropped."""

    def __init__(self) -> None:
        self.pending: list[Callable[[], Any]] = []
        self._norm_type = 2.0
        self._originals = (
            clip_grad._get_total_norm,
            clip_grad._clip_grads_with_norm_,
            clip_grad.clip_grad_value_,
        )

    def held(self, pending: list[Callable[[], Any]]) -> AbstractContextManager[Any]:
        """Add clips in the block to ``pending`` instead of applying them."""

        def note_norm(tensors: Any, norm_type: float = 2.0, *args: Any, **kwargs: Any) -> Any:
            self._norm_type = norm_type
            return self._originals[0](tensors, norm_type, *args, **kwargs)

        def hold_norm(parameters: Any, max_norm: float, _total: Any, foreach: bool | None = None) -> None:
            clip = partial(
                clip_grad.clip_grad_norm_, max_norm=max_norm, norm_type=self._norm_type, foreach=foreach
            )
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
        with (
            patch.object(clip_grad, "_get_total_norm", total_norm),
            patch.object(clip_grad, "_clip_grads_with_norm_", clip_with_norm),
            patch.object(torch.nn.utils, "clip_grad_value_", clip_value),
        ):
            yield


def _listed(parameters: Any) -> list[Tensor]:
    return [parameters] if isinstance(parameters, Tensor) else list(parameters)


class Clearing(OfOneOptimizer):
    """Notices a first pass that adds to old gradients instead of clearing them, until one has cleared them.

    Such a pass (of Lightning, with ``accumulate_grad_batches``) covers all of a step's micro-batches, and the
    second one only its own. A gradient from before must have gone, or been written, when the first backward
    that reaches it begins.
    """

    def __init__(self) -> None:
        self.is_seen = False
        self._probe: Any = None  # the smallest parameter with a gradient from before
        self._before: Any = None

    def begin(self, parameters: Iterable[Tensor]) -> None:
        """A first pass over ``parameters`` begins."""
        with_gradient = (
            p for p in parameters if p.requires_grad and p.grad is not None and p.grad.layout is torch.strided
        )
        self._probe = min(with_gradient, key=Tensor.numel, default=None)
        if self._probe is not None:  # FSDP2 adds to the shard inside a DTensor
            self._before = (self._probe.grad, local_shard(self._probe.grad)._version)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Around a backward: raise if it adds to a gradient from before, unless that is 0."""
        if self._probe is None:
            yield
            return
        probe, (gradient, version) = self._probe, self._before

        def is_open() -> bool:
            return probe.grad is gradient and local_shard(gradient)._version == version

        was_open = is_open()
        was_zero = was_open and not bool(local_shard(gradient).any())
        yield
        if was_open and is_open():
            return  # it was the backward of something else
        self._probe = None
        if was_open and not was_zero:
            raise RuntimeError(
                "The closure added to gradients from before it was called: its second call would lack them. "
                "Clear gradients in the closure and run all micro-batches of the step in it (in Lightning, "
                "by manual optimization instead of accumulate_grad_batches)."
            )
        self.is_seen = True


class RandomState:
    """The generators a loss may draw from: Python's, NumPy's (if loaded), torch's on CPU and devices."""

    def __init__(self, devices: Iterable[torch.device] = ()) -> None:
        self._devices = {device for device in devices if device.type not in ("cpu", "meta")}
        self._restorers: list[Callable[[], object]] = [
            partial(random.setstate, random.getstate()),
            partial(torch.set_rng_state, torch.get_rng_state()),
        ]
        if "numpy" in sys.modules:
            of_numpy = sys.modules["numpy"].random
            self._restorers.append(partial(of_numpy.set_state, of_numpy.get_state()))
        for device in self._devices:
            module = torch.get_device_module(device)
            self._restorers.append(partial(module.set_rng_state, module.get_rng_state(device), device=device))

    def restore(self) -> None:
        """Put every generator back to the recorded state."""
        for restore in self._restorers:
            restore()

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Run the block from the recorded state; afterwards put the generators back to where they were."""
        after = RandomState(self._devices)
        self.restore()
        try:
            yield
        finally:
            after.restore()
