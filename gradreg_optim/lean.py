"""``memory="lean"``: the second gradient is added to the first one as it arrives, and never held as a whole.

The combined gradient is linear in both gradients, with w = γ/ε:

    g1 + w·(g2 − g1)  =  (1 − w)·g1 + w·g2

so g1 can be scaled by 1 − w once θ' is reached, before the second pass, and w·g2 added parameter by parameter, micro-batch
by micro-batch, while the backward runs. Each piece of g2 is freed as soon as it is added. Beyond the base step that needs
the copy of the weights and one parameter's gradient. What has a price:

- Both products carry a rounding error of w·‖g1‖ in the last digit, where the difference carries that of ‖g2 − g1‖. The
  gradients themselves are no more exact than that, in float32; in half precision the sum would lose the difference.
- ‖g2‖ and ‖g2 − g1‖ are not known before both are mixed, and g1 is gone afterwards: no clip of g2, no bound on the
  penalty, no checks, and no way back to g1 if the second pass fails. ``metrics`` are estimated from a sample of elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gradreg_optim.finite_difference import Scalar, length_of_sum, ratio, readable, sampled, scale_
from gradreg_optim.gradients import FirstGradient, Share, real, stack_scalars
from gradreg_optim.phases import NO_SECOND_GRADIENT, WHOLE, RegularizedStep

__all__ = ["LeanStep"]


class LeanStep(RegularizedStep):
    """The step with one gradient in memory, where the setting asks for it."""

    @property
    def _is_lean(self) -> bool:
        return bool(self.param_groups[0]["gradreg_memory"] == "lean")

    def _check_is_due(self) -> bool:
        return not self._is_lean and super()._check_is_due()

    def _pass_again(self, first: FirstGradient, second_pass: Callable[[], Any]) -> None:
        if not self._is_lean:
            super()._pass_again(first, second_pass)
            return
        _check_dtypes(first)
        with self._at(first, WHOLE):
            try:
                for share in first.shares:
                    share.samples = [sampled(g1).clone() for g1 in share.g1]
                    scale_(share.g1, 1.0 - share.weight)
                with added_to(first):
                    second_pass()
            except BaseException:
                for share in first.shares:  # neither gradient any more
                    for parameter in share.parameters:
                        parameter.grad = None
                    share.parameters.clear()
                    share.gradients.clear()
                raise

    def _combine(self, first: FirstGradient) -> None:
        if not self._is_lean:
            super()._combine(first)
            return
        shares, scale = first.shares, self._loss_scale()
        inner, squares, arrived, sent = self._summed(shares, [self._sampled_moments(share) for share in shares])
        norm = self._norms(first, [share.g1 for share in shares])
        finite = readable(torch.isfinite(norm * scale).all())
        g1_squared = stack_scalars([share.g1_squared for share in shares])
        weights = stack_scalars([share.weight for share in shares], inner)
        steps = stack_scalars([share.eps for share in shares], inner)
        self._metrics |= {
            "penalty_ratio": ratio((weights.square() * squares).sum().sqrt(), g1_squared.sum().sqrt()),
            "curvature": ratio(ratio(inner, steps).sum(), g1_squared.sum()),
        }
        g2_norm = length_of_sum(g1_squared, inner, squares)
        self._note_difference(first, inner, g2_norm, g2_norm, torch.zeros_like(g2_norm, dtype=torch.bool), arrived, sent)
        self._put_back(first)
        self._count_skipped(finite)
        if finite is not True and not self._overflow_skips_step:  # there is no g1 to fall back on
            for gradient in (gradient for share in shares for gradient in share.g1):
                torch.where(torch.as_tensor(finite), gradient, torch.zeros_like(gradient), out=gradient)

    def _sampled_moments(self, share: Share) -> tuple[Tensor, Tensor]:
        """⟨Δ, g1⟩ and ‖Δ‖² of a share, as its samples tell them: the sum is g1 + w·Δ."""
        mesh = self._mesh()
        inner, squares = [], []
        for start, end in zip(share.counted(share.samples, mesh), share.counted(share.g1, mesh), strict=True):
            part = sampled(end)
            delta = ratio(part - start, torch.as_tensor(share.weight, dtype=part.dtype, device=part.device))
            factor = end.numel() / max(1, part.numel())
            inner.append(factor * (delta * start).sum())
            squares.append(factor * delta.square().sum())
        if not inner:
            return torch.zeros(()), torch.zeros(())
        return stack_scalars(inner).sum(), stack_scalars(squares).sum()


@contextmanager
def added_to(first: FirstGradient) -> Iterator[None]:
    """Inside the block, each gradient that a backward writes is multiplied by its share's weight, added to g1, and freed.

    Raises:
        RuntimeError: no gradient arrived, or some were written after they had been added.
    """
    place: dict[Tensor, tuple[Share | None, int]] = {parameter: (None, 0) for parameter, _ in first.kept}
    for share in first.shares:
        place |= {parameter: (share, position) for position, parameter in enumerate(share.parameters)}
    late = {parameter: share for share in first.shares for parameter in share.absent}
    arrived = 0

    @torch.no_grad()
    def take(parameter: Tensor) -> None:
        nonlocal arrived
        gradient: Any = parameter.grad
        parameter.grad = None
        if parameter in late:  # g1 is 0 there
            place[parameter] = _joined(late.pop(parameter), parameter, gradient)
        share, position = place[parameter]
        if share is not None:
            add_(share.g1[position], real(gradient.resolve_conj()), share.weight)
            arrived += 1

    hooks = [parameter.register_post_accumulate_grad_hook(take) for parameter in (*place, *late)]  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if any(parameter.grad is not None for parameter in place):
        raise RuntimeError(
            "memory='lean': gradients were written after a backward had handed them over, as DistributedDataParallel does "
            "with its averages: they would be lost. Use memory='full', FSDP2 or ZeRO."
        )
    if not arrived:
        raise RuntimeError(NO_SECOND_GRADIENT)


def _joined(share: Share, parameter: Tensor, gradient: Tensor) -> tuple[Share, int]:
    """Let a parameter that only the second pass reaches be one of the share's; its place there."""
    share.join(parameter, gradient)
    share.samples.append(sampled(share.g1[-1]).clone())
    share.absent = [other for other in share.absent if other is not parameter]
    return share, len(share.parameters) - 1


def add_(target: Tensor, gradient: Tensor, weight: Scalar) -> None:
    """``target ← target + weight·gradient`` in place."""
    if isinstance(weight, Tensor):
        target.addcmul_(gradient, weight.to(target.dtype))
    else:
        target.add_(gradient, alpha=weight)


def _check_dtypes(first: FirstGradient) -> None:
    for share in first.shares:
        for parameter, g1 in zip(share.parameters, share.g1, strict=True):
            if g1.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"memory='lean': the gradient of a parameter of shape {tuple(parameter.shape)} is {g1.dtype}, and a sum "
                    "of two gradients keeps their small difference in float32 and float64 only. Use memory='full', or "
                    "weights in float32 under autocast."
                )
