"""Storage in parameters and ``.grad``: plain tensors, and the DTensors of FSDP2 and tensor parallelism."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from gradreg_optim.core import multi_tensor
from gradreg_optim.core.foreign import (
    NoSecondGradient,
    refuse_foreign,
    refuse_meta,
    refuse_refilled,
    refuse_shared,
    refuse_unscaled,
)
from gradreg_optim.core.replicas import WHOLE, Part
from gradreg_optim.core.step import FirstGradient, Gradients, GroupGradients, Scalar
from gradreg_optim.core.tensors import aligned, device_mesh, differ, is_counted, require_dense

_Sum = dict[int, Tensor]
"""Gradients by the ``id`` of their parameter."""


class LocalStorage:
    """One step's view of the parameters of an optimizer.

    Taking a gradient means taking it out of ``.grad``: nothing is copied, and nothing can be zeroed in place.
    A parameter that only one of two passes reaches has a gradient of 0 in the other.

    Memory: g1, and one copy of the regularized weights while they are away from θ. Communication: none for
    plain tensors (DistributedDataParallel has averaged the gradients); for DTensors each
    :meth:`sum_over_ranks` is an all_reduce of a few float64 numbers over each dimension of the mesh.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        scaler: Any = None,
        optimizers: Sequence[Any] = (),
        *,
        is_first: bool = False,
        part: Part = WHOLE,
    ) -> None:
        """View ``groups``, whose gradients ``scaler`` scales until it has unscaled one of ``optimizers``.

        ``is_first``: no step has shown yet that θ comes back. ``part`` is the micro-batch.
        """
        self._is_first, self._part = is_first, part
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._optimizers = optimizers
        self.loss_scale = (1.0 if self._scaler is None else float(scaler.get_scale())) / part.of
        self.overflow_skips_step = self._scaler is not None
        self._groups = groups
        self._mesh = device_mesh(parameter for group in groups for parameter in group["params"])
        self.loss_ranks = 1 if self._mesh is None else self._mesh.size()
        # Regularized parameters that had a gradient, and these gradients.
        self._reached: list[list[Tensor]] = [[] for _ in groups]
        self._gradients: list[list[Tensor]] = [[] for _ in groups]
        self._unreached: list[list[Tensor]] = [[] for _ in groups]  # regularized parameters that had none
        # Parameters that are not regularized, and their gradients.
        self._kept: list[tuple[Tensor, Tensor | None]] = []
        # Parameters, their gradients in the first pass, their versions.
        self._held: list[tuple[Tensor, Tensor, int]] = []
        self._trainable = [parameter for parameter in self._parameters() if parameter.requires_grad]
        self._versions = [parameter._version for parameter in self._trainable]
        self._addresses = (
            [parameter.data_ptr() for parameter in self._trainable] if is_first and self._mesh is None else []
        )
        # Gradients that frozen parameters have from before: a pass may train such a parameter and
        # freeze it again (GANs).
        frozen = (parameter for parameter in self._parameters() if not parameter.requires_grad)
        self._stale = {id(p): (p.grad, p.grad._version) for p in frozen if p.grad is not None}
        self._was_unscaled = self._is_unscaled()
        if any(parameter.is_meta for parameter in self._trainable):
            refuse_meta(self._trainable)
        on_cpu: list[Any] = [parameter for parameter in self._trainable if parameter.device.type == "cpu"]
        if is_first and any(parameter.is_shared() for parameter in on_cpu):
            refuse_shared()

    @property
    def devices(self) -> set[torch.device]:
        """Those of all parameters."""
        return {parameter.device for parameter in self._parameters()}

    @property
    def has_low_precision(self) -> bool:
        """Whether a trainable parameter is in half precision."""
        return any(p.dtype.itemsize < torch.float32.itemsize for p in self._parameters() if p.requires_grad)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Keep gradients of earlier micro-batches out of the block's reach; then add those that it leaves.

        Memory: one gradient. If the block raises, they are as before.
        """
        parameters = [*self._parameters()]
        before = [detached_from_bucket(self._gradient_of(parameter)) for parameter in parameters]
        try:
            for parameter in parameters:
                parameter.grad = None
            yield
            pairs = [(p, old) for p, old in zip(parameters, before, strict=True) if old is not None]
            both = [(real(p.grad), real(old)) for p, old in pairs if p.grad is not None]
            if both:  # into the new ones, so that the old ones are whole whenever this is interrupted
                torch._foreach_add_(*map(list, zip(*both, strict=True)))
            for parameter, old in pairs:
                parameter.grad = old if parameter.grad is None else parameter.grad
        except BaseException:
            for parameter, gradient in zip(parameters, before, strict=True):
                parameter.grad = gradient
            raise

    # g1.

    def check_first_pass(self) -> None:
        """Raise ``RuntimeError`` if something else has used or unscaled the gradients of the first pass."""
        moved = [
            p for p, version in zip(self._trainable, self._versions, strict=True) if p._version != version
        ]
        is_empty = all(parameter.grad is None for parameter in self._trainable)
        if moved or (is_empty and not self._part.may_be_empty):
            refuse_foreign(self._trainable, moved)
        if self._is_unscaled() and not self._was_unscaled:
            refuse_unscaled()

    @property
    def first_pass_moved(self) -> bool:
        """Whether the first pass of a first step wrote weights, or gave them new memory."""
        moved = (p._version != version for p, version in zip(self._trainable, self._versions, strict=True))
        replaced = (
            p.data_ptr() != address for p, address in zip(self._trainable, self._addresses, strict=False)
        )
        return self._is_first and (any(moved) or any(replaced))

    def _is_unscaled(self) -> bool:
        return self._scaler is not None and any(map(self._scaler._found_inf_per_device, self._optimizers))

    def take(self, strengths: Sequence[float], excluded: Sequence[frozenset[int]]) -> FirstGradient:
        """Sort the gradients; ``.grad`` is ``None`` afterwards."""
        first = FirstGradient([GroupGradients(strength) for strength in strengths])
        try:
            for number, group in enumerate(self._groups):
                for position, parameter in enumerate(group["params"]):
                    is_trained = parameter.requires_grad or self._is_fresh(parameter)
                    is_regularized = strengths[number] and position not in excluded[number] and is_trained
                    first.is_frozen_again |= bool(is_regularized) and not parameter.requires_grad
                    self._take_one(first.groups[number], number, parameter, is_regularized)
        except BaseException:
            self.put_back(first)
            raise
        return first

    def _is_fresh(self, parameter: Tensor) -> bool:
        """Whether a frozen parameter has a gradient from this pass."""
        gradient, version = self._stale.get(id(parameter), (None, 0))
        return parameter.grad is not None and (parameter.grad is not gradient or gradient._version != version)

    def _take_one(
        self, group: GroupGradients, number: int, parameter: Tensor, is_regularized: object
    ) -> None:
        gradient = detached_from_bucket(self._gradient_of(parameter))
        if gradient is not None and gradient.layout is torch.strided and gradient.numel():
            self._held.append((parameter, gradient, gradient._version))
        if not is_regularized:
            self._kept.append((parameter, gradient))
        elif gradient is None:
            self._unreached[number].append(parameter)
        else:
            gradient = require_dense(gradient, parameter)
            self._reached[number].append(parameter)
            self._gradients[number].append(gradient)
            group.weights.append(real(parameter))
            self._append(group, parameter, gradient)
        parameter.grad = None

    def _append(self, group: GroupGradients, parameter: Tensor, gradient: Tensor) -> None:
        group.g1.append(real(gradient))
        if self._mesh is not None:
            group.counts = [*(group.counts or []), is_counted(parameter, self._mesh)]

    def has_gradient(self, first: FirstGradient) -> bool:
        """Whether any regularized parameter has one."""
        return any(group.g1 for group in first.groups)

    def put_back(self, first: FirstGradient) -> None:
        """Put g1 back into ``.grad``; a missing gradient stays missing: optimizers tell it from 0."""
        for parameter, gradient in self._kept:
            parameter.grad = gradient
        for reached, gradients, unreached in zip(
            self._reached, self._gradients, self._unreached, strict=True
        ):
            for parameter, gradient in zip(reached, gradients, strict=False):
                parameter.grad = gradient
            for parameter in unreached:
                parameter.grad = None

    abandon = put_back  # the weights are at θ: ``moved`` has seen to that

    def keep(self, first: FirstGradient) -> None:
        """Nothing is left to do: the combined gradient was written into ``.grad``."""

    # Weights.

    @contextmanager
    def moved(
        self,
        first: FirstGradient,
        steps: list[Scalar],
        *,
        seed: int | None,
        measured: bool,
        signs: int | None = None,
    ) -> Iterator[None]:
        """The weights, moved in place; copied back on the way out, however the block is left."""
        saved: list[list[Tensor]] = []
        try:
            for number, (group, step) in enumerate(zip(first.groups, steps, strict=True)):
                seeds = {
                    "seed": multi_tensor.of_group(seed, number),
                    "signs": multi_tensor.of_group(signs, number),
                }
                theta, arrived = multi_tensor.save_and_shift_(group.weights, group.g1, eps=step, **seeds)
                saved.append(theta)
                if measured:
                    self._measure(group, theta, arrived)
            # Inside an autocast block around all passes, bf16 copies of θ would be used again.
            torch.clear_autocast_cache()
            yield
        finally:
            for group, theta in zip(first.groups, saved, strict=False):  # fewer if a copy could not be had
                multi_tensor.restore_(group.weights, theta)
            self._restore_replaced(first, saved)
            torch.clear_autocast_cache()

    def _restore_replaced(self, first: FirstGradient, saved: list[list[Tensor]]) -> None:
        """Restore θ where the pass replaced memory (``.data = …``); in a first step, compare all of θ."""
        for reached, group, copies in zip(self._reached, first.groups, saved, strict=False):
            for parameter, weight, theta in zip(reached, group.weights, copies, strict=False):
                if (
                    self._mesh is None
                    and parameter.data_ptr() != weight.data_ptr()
                    and parameter.shape == theta.shape
                ):
                    real(parameter).copy_(theta)
                if self._is_first and not parameter.is_meta and differ(real(parameter), theta):
                    raise RuntimeError(
                        f"A parameter of shape {tuple(parameter.shape)} is not what it was before the "
                        "further passes: one of them wrote it or replaced it. Let forwards leave the "
                        "optimizer's parameters alone, and write them after step()."
                    )

    def _measure(
        self, group: GroupGradients, theta: list[Tensor], arrived: tuple[Scalar, Scalar] | None
    ) -> None:
        tensors = [group.counted(xs) for xs in (theta, group.weights, group.g1)]
        if arrived is None or len(tensors[0]) < len(theta):
            arrived = multi_tensor.step_moments(*tensors)
        group.moved_along, group.step_squared = arrived

    # Gradients at further points.

    def last(self, first: FirstGradient) -> Gradients:
        """Leave g2 in ``.grad`` and return views of it; parameters that are not regularized get g1 back."""
        if any(gradient._version != version for _, gradient, version in self._held):
            refuse_refilled()
        if self._mesh is None and any(
            p.grad is not None and p.grad.data_ptr() == g.data_ptr() for p, g, _ in self._held
        ):
            refuse_refilled()
        for parameter, gradient in self._kept:
            parameter.grad = gradient
        if not any(parameter.grad is not None for parameter in chain(*self._reached, *self._unreached)):
            raise NoSecondGradient
        return [self._last_of(number, group) for number, group in enumerate(first.groups)]

    def _last_of(self, number: int, group: GroupGradients) -> list[Tensor]:
        for parameter in self._unreached[number]:  # the last pass reaches it, and g1 is 0
            if parameter.grad is not None:
                self._reached[number].append(parameter)
                self._gradients[number].append(torch.zeros_like(parameter.grad))
                self._append(group, parameter, self._gradients[number][-1])
        written = []
        for parameter, gradient in zip(self._reached[number], self._gradients[number], strict=True):
            last = self._gradient_of(parameter)
            parameter.grad = torch.zeros_like(gradient) if last is None else last.resolve_conj()
            written.append(real(parameter.grad))
        return written

    def take_sum(self) -> _Sum:
        """Take the gradients out of ``.grad``."""
        taken: _Sum = {}
        for parameter in self._parameters():
            if (gradient := detached_from_bucket(self._gradient_of(parameter))) is not None:
                taken[id(parameter)] = gradient
            parameter.grad = None
        return taken

    def see_sum(self) -> _Sum:
        """The gradients in ``.grad``, which stay there."""
        return {id(p): gradient for p in self._parameters() if (gradient := self._gradient_of(p)) is not None}

    def laid_out(self, first: FirstGradient, gradients: _Sum) -> Gradients:
        """Lay them out like g1, 0 where there is none."""
        return [
            [
                real(gradients[id(p)].resolve_conj()) if id(p) in gradients else torch.zeros_like(g1)
                for p, g1 in zip(reached, group.g1, strict=True)
            ]
            for reached, group in zip(self._reached, first.groups, strict=True)
        ]

    def _gradient_of(self, parameter: Tensor) -> Tensor | None:
        return (
            parameter.grad
            if self._mesh is None or parameter.grad is None
            else aligned(parameter.grad, parameter)
        )

    def _parameters(self) -> Iterator[Tensor]:
        return (parameter for group in self._groups for parameter in group["params"])

    def sum_over_replicas(self, sums: Tensor) -> Tensor:
        """Sums over ranks that have not reduced their gradients."""
        return self._part.replicas.sum(sums)

    def sum_over_ranks(self, sums: Tensor) -> Tensor:
        """Complete sums over all ranks that hold shards."""
        if self._mesh is None:
            return sums
        # A rank that owns nothing has made its zeros in some dtype and on the CPU: all must send the same.
        total = sums.to(self._mesh.device_type, torch.float64)
        for group in self._mesh.get_all_groups():
            torch.distributed.all_reduce(total, group=group)
        return total


def detached_from_bucket(gradient: Tensor | None) -> Tensor | None:
    """The gradient itself, or a copy if the second pass would overwrite it."""
    if gradient is None or gradient.layout != torch.strided:
        return gradient
    local = local_shard(gradient)
    # A view into a larger buffer, such as a bucket of DistributedDataParallel, which the next
    # backward fills again.
    shared = local.untyped_storage().nbytes() > local.numel() * local.element_size()
    return gradient.clone() if shared else gradient


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def real(tensor: Tensor) -> Tensor:
    """A view of ``tensor`` for the arithmetic: local, with one element for each real number."""
    local = local_shard(tensor.detach())
    return torch.view_as_real(local) if local.is_complex() else local
