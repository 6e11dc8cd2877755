"""The steps between two regularized ones, with ``every=k`` and ``between="reuse"``: the last penalty, once more.

Of the last regularized step two things are kept: the curvature along its gradient, c = ⟨h, g1⟩/‖g1‖² with h = penalty/γ,
and what of h lies across it, as v = (h − c·g1)/‖g1‖. At the gradient g of a later step

    H·g  ≈  c·g + ‖g‖·v

LookSAM (Liu et al. 2022, arXiv 2203.02714) keeps v, too, and rescales it. The part along the gradient is taken at the
gradient at hand: gradients of later batches point elsewhere, and the old part would be wrong by that much. It costs no
memory; v costs one gradient. Each reused penalty is a poor estimate of the one in its place (a cosine of .2 to .7 at the
next steps); over many steps more of it is right. So far nothing was measured in which it did better than ``every`` times the
strength without it (``benchmarks/below_two.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradreg_optim.checks import Gradients
from gradreg_optim.finite_difference import difference_moments, readable, scale_, shift_
from gradreg_optim.gradients import FirstGradient, real, stack_scalars
from gradreg_optim.phases import RegularizedStep

__all__ = ["ReusedPenalty"]

ACROSS = "gradreg_across"
"""v, in the optimizer's state of each parameter."""


class ReusedPenalty(RegularizedStep):
    """Keeps the penalty of a regularized step, and adds it to the gradients of the steps up to the next one."""

    _fresh: dict[Tensor, Tensor]
    _stateless: dict[Tensor, Tensor]

    @property
    def reuses(self) -> bool:
        """Whether the step to come takes one gradient, and the last penalty."""
        group = self.param_groups[0]
        return (
            group["gradreg_between"] == "reuse"
            and group["gradreg_along"] is not None
            and any(strength > 0 for strength in self._strengths())
            and not self._is_turn()
        )

    @torch.no_grad()
    def reuse_(self) -> None:
        """Add γ·(c·g + ‖g‖·v) to the gradients g, which ``.grad`` holds."""
        first = FirstGradient([], [])
        self._take_gradients(first)
        try:
            if not self._choose_step(first):
                return
            norm = stack_scalars([share.g1_squared for share in first.shares]).sum().sqrt() * self._loss_scale()
            for share, group in zip(first.shares, self.param_groups, strict=True):
                found = [(g, self._across(p)) for g, p in zip(share.g1, share.parameters, strict=True)]
                scale_(share.g1, 1.0 + share.strength * group["gradreg_along"])
                kept = [(g, real(across)) for g, across in found if across is not None]
                shift_([g for g, _ in kept], [across for _, across in kept], eps=readable(share.strength * norm))
        finally:
            self._put_back(first)

    def _keep(self, first: FirstGradient, combined: Gradients) -> None:
        """Keep c and v; reading c is a wait for the device, one in ``every`` steps."""
        group = self.param_groups[0]
        if group["gradreg_between"] != "reuse" or group["gradreg_every"] == 1:
            return
        scale, norm_squared = self._loss_scale(), stack_scalars([share.g1_squared for share in first.shares]).sum()
        inner = []
        for share, g in zip(first.shares, combined, strict=True):
            part, _ = difference_moments(*(share.counted(x, self._mesh()) for x in (share.g1, g, share.g1)))
            inner.append(part / share.strength if share.strength else part)
        along = float(self._sum_over_ranks(stack_scalars(inner)).sum() / scale**2 / norm_squared)
        if along != along:  # NaN: the second gradient was not finite, and there was no penalty
            return
        for share, g in zip(first.shares, combined, strict=True):
            for parameter, gradient, g1, end in zip(share.parameters, share.gradients, share.g1, g, strict=True):
                across = torch.zeros_like(gradient)
                real(across).copy_(end).sub_(g1).div_(share.strength).sub_(g1, alpha=along).div_(norm_squared.sqrt() * scale)
                self._fresh[parameter] = across
        for group in self.param_groups:
            group["gradreg_along"] = along

    def _across(self, parameter: Tensor) -> Tensor | None:
        """The v of a parameter, if it has one."""
        kept: dict[str, Any] = self.state.get(parameter, {})
        across = kept.get(ACROSS)
        return self._stateless.get(parameter) if across is None else across

    def _advance(self) -> None:
        # Not before the base step: optimizers take an empty state for one that they have yet to make.
        for parameter, across in self._fresh.items():
            if self.state.get(parameter):
                self.state[parameter][ACROSS] = across
                self._stateless.pop(parameter, None)
            else:
                self._stateless[parameter] = across
        self._fresh.clear()
        super()._advance()
