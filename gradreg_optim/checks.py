"""Is Δ curvature, or rounding? The check of a step; what its figures mean is said in :mod:`gradreg_optim.precision`."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradreg_optim.finite_difference import Scalar, inner_of_differences
from gradreg_optim.gradients import FirstGradient, stack_scalars
from gradreg_optim.precision import DEFAULT_CHECK_EVERY, SUFFICIENT, advice, signal_fraction
from gradreg_optim.wrapper import OptimizerWrapper

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["CheckedDifference", "Gradients"]

Gradients = list[list[Tensor]]
"""Tensors as the arithmetic wants them, one list a share."""


class CheckedDifference(OptimizerWrapper):
    """When to check, what a check measures, and what follows from it."""

    _metrics: dict[str, Scalar]
    _admonished: bool

    def _check_is_due(self) -> bool:
        group = self.param_groups[0]
        every = group["gradreg_check_every"]
        if every is None:
            every = DEFAULT_CHECK_EVERY if self._precision_is_low() else 0
        # Of ``gradreg_every`` steps in a row one is regularized: it is checked if the round number is among them.
        return bool(every) and (group["gradreg_floor"] is None or self.step_count % every < group["gradreg_every"])

    def _precision_is_low(self) -> bool:
        """Whether weights, or what a trainer computes with, have fewer bits than float32."""
        if self._attachment is not None and self._attachment.computes_in_low_precision:
            return True
        return any(p.dtype.itemsize < torch.float32.itemsize for p in self._parameters() if p.requires_grad)

    def _measure_noise(self, first: FirstGradient, near: Gradients) -> None:
        """Keep what gradients next to θ differ by from those at θ."""
        first.noise = self._inner(first, near, near)

    def _inner(self, first: FirstGradient, left: Gradients, right: Gradients) -> Tensor:
        """⟨left − g1, right − g1⟩ over this rank's tensors, g1 as it was before it was clipped."""
        mesh, unclip = self._mesh(), 1.0 / first.clip
        return stack_scalars(
            [
                inner_of_differences(*(share.counted(x, mesh) for x in (a, share.g1, b, share.g1)), scale=unclip)
                for share, a, b in zip(first.shares, left, right, strict=True)
            ]
        ).sum()

    def _check(self, first: FirstGradient, mirrored: Gradients, second: Gradients) -> None:
        """Measure self-check and noise floor, which costs a wait for the device, and say if the former is low."""
        method = self.param_groups[0]["gradreg_method"]
        pairs = ((second, mirrored), (second, second), (mirrored, mirrored))
        inner = [*(self._inner(first, *pair) for pair in pairs), first.noise]
        sums = self._sum_over_ranks(stack_scalars(inner)).tolist()
        scale = self._loss_scale()
        product, ahead, behind, noise = (value / scale**2 for value in sums)
        norm, eps = float(self._metrics["g1_norm"]), float(self._metrics["eps"])
        self_check = -product / math.sqrt(ahead * behind) if ahead * behind else 1.0
        floor = math.sqrt(noise) / norm if norm else 0.0
        if not math.isfinite(self_check) or not math.isfinite(floor):  # an overflow: once more in the next step
            return
        self._metrics["self_check"] = self_check
        for group in self.param_groups:
            group["gradreg_floor"] = floor
        if self_check < SUFFICIENT[method] and not self._admonished:
            self._admonished = True
            relative = math.sqrt(ahead if method == "forward" else (ahead + behind - 2 * product) / 4) / norm
            length = eps * norm * float(first.clip)
            warnings.warn(advice(self_check, floor * _noise(method), relative, eps, length), stacklevel=2)

    def _signal(self, relative_square: Tensor) -> Tensor | None:
        """Note floor and signal, if they are known; the factor on the penalty, if it is to shrink."""
        group = self.param_groups[0]
        floor = group["gradreg_floor"]
        if floor is None or group["gradreg_method"] == "exact":
            return None
        signal = signal_fraction(relative_square, floor * _noise(group["gradreg_method"]))
        self._metrics |= {"noise_floor": floor, "signal": signal}
        return signal if group["gradreg_shrink"] else None

    @abstractmethod
    def _mesh(self) -> DeviceMesh | None:
        """The mesh over which parameters are distributed, if they are."""

    @abstractmethod
    def _sum_over_ranks(self, sums: Tensor) -> Tensor:
        """Sums over this process's tensors, completed over all ranks that hold parts of distributed ones."""

    @abstractmethod
    def _loss_scale(self) -> float:
        """The factor that ``.grad`` carries."""


def _noise(method: str) -> float:
    """The rounding errors of Δ, in units of those of a difference: in (g₊ − g₋)/2 they are halved."""
    return 0.5 if method == "central" else 1.0
