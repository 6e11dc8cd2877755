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
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad

from gradreg_optim.core.local import local_shard
from gradreg_optim.core.module_state import ModuleState
from gradreg_optim.core.step import Point


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
            looks = is_first and not clearing.is_seen
            was_open = looks and clearing.is_open()
            backward(tensors, grad_tensors, *args, **kwargs)
            if looks:
                clearing.look(was_open=was_open)

        with ExitStack() as stack:
            if is_first:
                if not clearing.is_seen:
                    clearing.begin(parameters())
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
    """Replace each backward in the block by ``stand_in(backward, …)``.

    Backwards inside a backward, which reentrant checkpoints run, are left alone.
    """
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
    return tensors if tensors is None or isinstance(tensors, Tensor) else tuple(tensors)


class HeldClips:
    """The clips that the first pass of a step ended with. Those of further passes are dropped."""

    def __init__(self) -> None:
        self.pending: list[Callable[[], Any]] = []
        self._norm_type = 2.0
        self._originals = (
            clip_grad._get_total_norm,
            clip_grad._clip_grads_with_norm_,
            clip_grad.clip_grad_value_,
        )

    def __reduce__(self) -> Any:
        """A copy of the optimizer has clips of its own."""
        return HeldClips, ()

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
        functions = {"_get_total_norm": total_norm, "_clip_grads_with_norm_": clip_with_norm}
        with (
            patch.multiple(clip_grad, **functions),
            patch.object(torch.nn.utils, "clip_grad_value_", clip_value),
        ):
            yield


def _listed(parameters: Any) -> list[Tensor]:
    return [parameters] if isinstance(parameters, Tensor) else list(parameters)


class Clearing:
    """Notices a first pass that adds to old gradients instead of clearing them, until one has cleared them.

    Such a pass (of Lightning, with ``accumulate_grad_batches``) covers all of a step's micro-batches, and the
    second one only its own. A gradient from before must have gone, or been written, when the first backward
    that reaches it begins.
    """

    def __init__(self) -> None:
        self.is_seen = False
        self._probe: Any = None  # the smallest parameter with a gradient from before
        self._before: Any = None
        self._is_zero = False

    def __getstate__(self) -> dict[str, Any]:
        """A copy looks again."""
        return {"is_seen": False, "_probe": None, "_before": None, "_is_zero": False}

    def begin(self, parameters: Iterable[Tensor]) -> None:
        """A first pass over ``parameters`` begins."""
        with_gradient = (
            p for p in parameters if p.requires_grad and p.grad is not None and p.grad.layout is torch.strided
        )
        self._probe = min(with_gradient, key=Tensor.numel, default=None)
        if self._probe is not None:  # FSDP2 adds to the shard inside a DTensor
            self._before = (self._probe.grad, local_shard(self._probe.grad)._version)

    def is_open(self) -> bool:
        """Before a backward: whether the gradient is still the one from before."""
        if self._probe is None:
            return False
        gradient, version = self._before
        if self._probe.grad is not gradient or local_shard(gradient)._version != version:
            return False
        self._is_zero = not bool(local_shard(gradient).any())
        return True

    def look(self, *, was_open: bool) -> None:
        """After a backward: raise if it added to a gradient that was still open, unless that was 0."""
        if self._probe is None:
            return
        gradient, version = self._before
        if was_open and self._probe.grad is gradient and local_shard(gradient)._version == version:
            return  # it was the backward of something else
        if was_open and not self._is_zero:
            self._probe = None
            raise RuntimeError(
                "The closure added to gradients from before it was called: its second call would lack them. "
                "Clear gradients in the closure and run all micro-batches of the step in it (in Lightning, "
                "by manual optimization instead of accumulate_grad_batches)."
            )
        self.is_seen, self._probe = True, None


class RandomState:
    """The generators a loss may draw from: Python's, NumPy's (if loaded), torch's on CPU and devices."""

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
        """Run the block from the recorded state; afterwards put the generators back to where they were."""
        after = RandomState(self._devices)
        self.restore()
        try:
            yield
        finally:
            after.restore()
