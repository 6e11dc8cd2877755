"""The phases of a regularized step, on the tensors of one process.

    first gradient → direction (mask, clip) → shift → second gradient → restore → combine

Variants override where gradients and weights live, and how sums run over ranks. The methods differ in the points at which
they take gradients and in what they make of them:

    forward     θ, θ + ε·d              Δ = g2 − g1               g = g1 + (γ/ε)·Δ
    central     θ, θ − ε·d, θ + ε·d     Δ = (g₊ − g₋)/2           g = g1 + (γ/ε)·Δ
    exact       θ, twice                Δ = H·d                   g = g1 + γ·Δ

Where precision is low, now and then two further gradients tell how much of Δ is rounding (:mod:`gradreg_optim.checks`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradreg_optim.checks import CheckedDifference, Gradients
from gradreg_optim.exact import hessian_products
from gradreg_optim.finite_difference import (
    Scalar,
    add_penalty_,
    arrival,
    clip_coefficient,
    clipped_moments,
    combine_,
    combine_and_measure_,
    difference_moments,
    fused,
    halved_difference_,
    length_of_sum,
    moments,
    norm_squared,
    ratio,
    readable,
    recombine_,
    scale_,
)
from gradreg_optim.gradients import FirstGradient, Part, Share, dense, device_mesh, owned, real, stack_scalars
from gradreg_optim.perturbation import batch_norm_statistics_kept, shifted
from gradreg_optim.precision import MIRRORED, VANISHING

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["NO_SECOND_GRADIENT", "WHOLE", "RegularizedStep"]

WHOLE = 1.0
"""The point of the second gradient, in units of the step."""

NO_SECOND_GRADIENT = (
    "The second call of the closure left no gradient on any regularized parameter, the first one did. "
    "Let the closure clear the gradients and run forward and backward each time it is called."
)

Moments = tuple[Tensor, Tensor, Scalar, Scalar]
"""⟨Δ, g1⟩ and ‖Δ‖² of each share, whether Δ is finite, and a factor that g2 still needs."""


class RegularizedStep(CheckedDifference):
    """From the gradients at θ, which ``.grad`` holds, to the combined ones."""

    _skipped: Scalar

    @torch.no_grad()
    def regularize_(self, second_pass: Callable[[], Any], part: Part | None = None) -> None:
        """Replace the gradients at θ, which ``.grad`` holds, by the combined ones; ``second_pass`` is run at θ'.

        It is run more than once for ``method="central"`` and where a check is due. If it raises, the weights are at θ
        again, bit for bit, and ``.grad`` holds the first gradient. ``part`` says of which part of the first pass
        ``second_pass`` is a repetition, if not of all.
        """
        first = FirstGradient([], [], part=part)
        try:
            self._take_gradients(first)
            if not self._choose_step(first):
                self._put_back(first)
                return
            self._pass_again(first, second_pass)
        except BaseException:
            self._put_back(first)
            raise
        self._combine(first)

    def _pass_again(self, first: FirstGradient, second_pass: Callable[[], Any]) -> None:
        """Take the gradients of all points but θ; ``.grad`` is left with those at the last one."""
        for distance in self._further_points():
            with self._at(first, distance):
                second_pass()
            taken = self._take_further(first)
            if distance == VANISHING:  # its distance from g1 is all that is wanted of it: one gradient less to keep
                self._measure_noise(first, self._laid_out(first, taken))
            else:
                first.further[distance] = taken
        with self._at(first, WHOLE):
            second_pass()

    def _further_points(self) -> list[float]:
        """Where to take gradients besides θ and the last point."""
        method = self.param_groups[0]["gradreg_method"]
        if method == "exact":
            return []
        is_checked = self._check_is_due()
        return [VANISHING] * is_checked + [MIRRORED] * (method == "central" or is_checked)

    @contextmanager
    def _at(self, first: FirstGradient, distance: float) -> Iterator[None]:
        """Let the block take gradients ``distance`` steps from θ, or second derivatives at θ."""
        exact = self.param_groups[0]["gradreg_method"] == "exact"
        point: AbstractContextManager[None] = (
            self._differentiated_twice(first) if exact else self._perturbed(first, distance)
        )
        with point, batch_norm_statistics_kept(self._model):
            yield

    def _empty_shares(self) -> list[Share]:
        """One share a group, with its strength and ε in the step that begins here."""
        strengths = self._strengths()
        self._metrics = {"strength": next(filter(None, strengths), 0.0)}
        return [
            Share(strength, [], [], [], [], group["gradreg_eps"] if group["gradreg_radius"] is None else 0.0)
            for group, strength in zip(self.param_groups, strengths, strict=True)
        ]

    def _take_gradients(self, first: FirstGradient) -> None:
        """Move every ``.grad`` out of the way of the second pass: nothing is copied, nothing can be zeroed in place."""
        first.shares += self._empty_shares()
        for group, share in zip(self.param_groups, first.shares, strict=True):
            excluded = set(group["gradreg_excluded"])
            for position, parameter in enumerate(group["params"]):
                gradient = owned(parameter.grad)
                if share.strength == 0 or position in excluded or not parameter.requires_grad:
                    first.kept.append((parameter, gradient))
                elif gradient is not None:
                    gradient = dense(gradient, parameter)
                    share.parameters.append(parameter)
                    share.gradients.append(gradient)
                    share.weights.append(real(parameter))
                    share.g1.append(real(gradient))
                else:
                    share.absent.append(parameter)
                parameter.grad = None

    def _choose_step(self, first: FirstGradient) -> bool:
        """Clip g1 and fix ε; False if there is no gradient, or it is known not to be finite."""
        shares, unscale, mesh = first.shares, 1.0 / self._loss_scale(), self._mesh()
        if not self._has_gradient(shares):
            return False
        squares = self._sum_over_ranks(stack_scalars([norm_squared(share.counted(share.g1, mesh)) for share in shares]))
        norm = squares.sum().sqrt() * unscale
        finite = readable(torch.isfinite(norm))
        group = self.param_groups[0]
        coefficient = clip_coefficient(norm, group["gradreg_g1_clip"])
        coefficient = torch.where(torch.isfinite(norm), coefficient, torch.ones_like(coefficient))
        self._metrics |= {"g1_norm": norm, "g1_clipped": coefficient < 1}
        if finite is False:
            self._skipped = self._skipped + 1
            return False
        first.clip = readable(coefficient)
        for share, square, group in zip(shares, squares, self.param_groups, strict=True):
            scale_(share.g1, first.clip)
            share.g1_squared = square * (coefficient * unscale) ** 2
            if group["gradreg_radius"] is not None:
                share.eps = readable(ratio(group["gradreg_radius"], norm * coefficient))
        if group["gradreg_method"] != "exact":
            self._metrics["eps"] = next(share.eps for share in shares if share.strength)
        return True

    @contextmanager
    def _perturbed(self, first: FirstGradient, distance: float) -> Iterator[None]:
        """Stand at θ + distance·ε·d inside the block, at θ again after it.

        At the last point, note how much of the step the weights' dtype let through.
        """
        shares = first.shares
        unscale, mesh = 1.0 / self._loss_scale(), self._mesh()
        steps = [share.eps * unscale * distance for share in shares]
        # A vanishing step would be rounded to nothing: only stochastic rounding lets some of it through.
        rounds_to_nearest = self.param_groups[0]["gradreg_rounding"] == "nearest" and distance != VANISHING
        seed = None if rounds_to_nearest else self.step_count
        weights, g1 = [share.weights for share in shares], [share.g1 for share in shares]
        with shifted(weights, g1, steps, seed=seed) as at_theta:
            if distance == WHOLE:
                for share, start in zip(shares, at_theta, strict=True):
                    arrived, sent = arrival(*(share.counted(x, mesh) for x in (start, share.weights, share.g1)))
                    share.arrived, share.sent = arrived * unscale, sent * unscale**2
            yield

    @contextmanager
    def _differentiated_twice(self, first: FirstGradient) -> Iterator[None]:
        """Let ``.grad`` collect H·d inside the block."""
        if self._mesh() is not None:
            raise RuntimeError(
                "method='exact': no second derivatives are taken of parameters that are distributed over ranks (DTensor). "
                "Use method='forward' or 'central' under FSDP2 and tensor parallelism."
            )
        parameters = [parameter for share in first.shares for parameter in share.parameters]
        direction = [gradient for share in first.shares for gradient in share.gradients]
        with hessian_products(parameters, direction, scale=1.0 / self._loss_scale(), model=self._model):
            yield

    def _take_further(self, first: FirstGradient) -> Any:
        """The gradients of a further point, out of the way of the next pass; see :meth:`_aligned`."""
        taken = {}
        for share in first.shares:
            for parameter in share.parameters:
                if parameter.grad is not None:
                    taken[id(parameter)] = owned(parameter.grad)
                parameter.grad = None
        for parameter in (*(parameter for parameter, _ in first.kept), *(p for share in first.shares for p in share.absent)):
            parameter.grad = None
        return taken

    def _aligned(self, first: FirstGradient, taken: Any) -> Gradients:
        """What :meth:`_take_further` returned, laid out like the first gradient; 0 where there was none."""
        return [
            [
                real(taken[id(parameter)].resolve_conj()) if id(parameter) in taken else torch.zeros_like(g1)
                for parameter, g1 in zip(share.parameters, share.g1, strict=True)
            ]
            for share in first.shares
        ]

    def _laid_out(self, first: FirstGradient, taken: Any) -> Gradients:
        """The same, standing for all micro-batches."""
        gradients = self._aligned(first, taken)
        self._completed(first, gradients)
        return gradients

    def _second_gradient(self, share: Share) -> list[Tensor]:
        """g2 of one share. A parameter that only one of the two passes reached has a gradient of 0 in the other."""
        for parameter in share.absent:
            if parameter.grad is not None:
                share.join(parameter, parameter.grad)
        second = []
        for parameter, gradient in zip(share.parameters, share.gradients, strict=True):
            parameter.grad = torch.zeros_like(gradient) if parameter.grad is None else parameter.grad.resolve_conj()
            second.append(real(parameter.grad))
        return second

    def _second_gradients(self, first: FirstGradient) -> Gradients:
        """g2, share by share; excluded parameters get g1 back."""
        shares = first.shares
        for parameter, gradient in first.kept:
            parameter.grad = gradient
        if not any(parameter.grad is not None for share in shares for parameter in share.parameters):
            self._put_back(first)
            raise RuntimeError(NO_SECOND_GRADIENT)
        return [self._second_gradient(share) for share in shares]

    def _combine(self, first: FirstGradient) -> None:
        """Write g1 + (γ/ε)·Δ over g2."""
        shares, second = first.shares, self._second_gradients(first)
        self._completed(first, second)
        further = {distance: self._laid_out(first, taken) for distance, taken in first.further.items()}
        if first.noise is not None:
            self._check(first, further[MIRRORED], second)
        method = self.param_groups[0]["gradreg_method"]
        if method == "exact":
            inner, squares, finite, clip = self._exact_moments(first, second)
        elif method == "central":
            inner, squares, finite, clip = self._central_moments(first, further[MIRRORED], second)
        else:
            inner, squares, finite, clip = self._forward_moments(first, second)
        first.further.clear()
        further.clear()

        g1_squared = stack_scalars([share.g1_squared for share in shares])
        g1_norm, length = g1_squared.sum().sqrt(), squares.sum()
        weights: list[Scalar] = [share.strength if method == "exact" else share.weight for share in shares]
        penalty = (stack_scalars(weights, inner).square() * squares).sum().sqrt()
        factor = self._signal(length / g1_squared.sum())
        if factor is not None:
            weights, penalty = [readable(weight * factor) for weight in weights], penalty * factor
        limit = self.param_groups[0]["gradreg_max_penalty_ratio"]
        if limit is not None:
            bound = torch.where(penalty > limit * g1_norm, limit * g1_norm / penalty, torch.ones_like(penalty))
            weights, penalty = [readable(weight * bound) for weight in weights], penalty * bound
        steps = 1.0 if method == "exact" else stack_scalars([share.eps for share in shares], inner)
        self._metrics |= {
            "penalty_ratio": ratio(penalty, g1_norm),
            "curvature": ratio(ratio(inner, steps * torch.ones_like(inner)).sum(), g1_squared.sum()),
        }
        self._count_skipped(finite)
        if finite is False and not self._overflow_skips_step:
            self._put_back(first)
            return
        for share, g2, weight in zip(shares, second, weights, strict=True):
            if method != "forward":
                add_penalty_(share.g1, g2, weight=weight)
            elif share.written is None:
                scale_(g2, clip)
                combine_(share.g1, g2, weight=weight)
            elif (weight, clip) != (share.written, 1.0):
                recombine_(share.g1, g2, before=share.written, weight=float(weight), coefficient=float(clip))
            if isinstance(finite, Tensor) and not self._overflow_skips_step:  # nobody has read it: choose on the device
                for a, b in zip(share.g1, g2, strict=True):
                    torch.where(finite, b, a, out=b)
        self._keep(first, second)

    def _count_skipped(self, finite: Scalar) -> None:
        """Count the step if its gradients are not finite, without reading what is on a device."""
        if finite is not True:
            self._skipped = self._skipped + (1 if finite is False else (~torch.as_tensor(finite)).long())

    @abstractmethod
    def _completed(self, first: FirstGradient, gradients: Gradients) -> None:
        """Make gradients of a part of the micro-batches stand for those of all."""

    @abstractmethod
    def _keep(self, first: FirstGradient, combined: Gradients) -> None:
        """Keep what later steps use again of this one's penalty."""

    def _forward_moments(self, first: FirstGradient, second: Gradients) -> Moments:
        """Those of Δ = c·g2 − g1, which is not written anywhere, with the clip c."""
        shares = first.shares
        inner, squares, arrived, sent = self._summed(shares, list(map(self._measured, shares, second)))
        g1_squared = stack_scalars([share.g1_squared for share in shares])
        g2_norm = length_of_sum(g1_squared, inner, squares)
        c = clip_coefficient(g2_norm, self.param_groups[0]["gradreg_g2_clip"])
        inner, squares = clipped_moments(inner, squares, g1_squared, coefficient=c)
        self._note_difference(first, inner, g2_norm, c * g2_norm, c < 1, arrived, sent)
        return inner, squares, readable(torch.isfinite(g2_norm)), readable(c)

    def _measured(self, share: Share, g2: list[Tensor]) -> tuple[Tensor, Tensor]:
        """⟨g2 − g1, g1⟩ and ‖g2 − g1‖²; on a CPU in one pass with the combination, as it is if nothing bounds it."""
        mesh, weight = self._mesh(), share.weight
        if mesh is None and fused(weight, share.g1, g2):
            share.written = float(weight)
            return combine_and_measure_(share.g1, g2, weight=share.written)
        return difference_moments(*(share.counted(x, mesh) for x in (share.g1, g2, share.g1)))

    def _central_moments(self, first: FirstGradient, minus: Gradients, second: Gradients) -> Moments:
        """The same for Δ = (g₊ − g₋)/2, each side clipped; Δ is written over g₊."""
        shares, limit = first.shares, self.param_groups[0]["gradreg_g2_clip"]
        norms = self._norms(first, second, minus)
        clips = [clip_coefficient(norm, limit) for norm in norms]
        for side, clip in zip((second, minus), clips, strict=True):
            for gradients in side:
                scale_(gradients, readable(clip))
        for plus, other in zip(second, minus, strict=True):
            halved_difference_(plus, other)
        inner, squares, arrived, sent = self._summed(shares, self._written_moments(first, second))
        at_plus = length_of_sum(stack_scalars([share.g1_squared for share in shares]), inner, squares)
        self._note_difference(first, inner, norms[0], at_plus, torch.minimum(*clips) < 1, arrived, sent)
        return inner, squares, readable(torch.isfinite(squares.sum())), 1.0

    def _exact_moments(self, first: FirstGradient, second: Gradients) -> Moments:
        """The same for Δ = H·d, which is where g2 would be."""
        inner, squares, *_ = self._summed(first.shares, self._written_moments(first, second))
        return inner, squares, readable(torch.isfinite(squares.sum())), 1.0

    def _written_moments(self, first: FirstGradient, delta: Gradients) -> list[tuple[Tensor, Tensor]]:
        mesh = self._mesh()
        return [
            moments(share.counted(written, mesh), share.counted(share.g1, mesh))
            for share, written in zip(first.shares, delta, strict=True)
        ]

    def _note_difference(
        self, first: FirstGradient, inner: Tensor, g2_norm: Tensor, used: Tensor, clipped: Tensor, arrived: Any, sent: Any
    ) -> None:
        """The figures that only a difference has; ``used`` is ‖g2‖ as it enters the difference."""
        g1_squared = stack_scalars([share.g1_squared for share in first.shares])
        eps = stack_scalars([share.eps for share in first.shares], inner)
        self._metrics |= {
            "g2_norm": g2_norm,
            "g2_clipped": clipped,
            "cosine": ratio(g1_squared.sum() + inner.sum(), g1_squared.sum().sqrt() * used),
            "perturbation_fidelity": ratio((eps * arrived).sum(), (eps.square() * sent).sum()),
        }

    def _summed(self, shares: list[Share], pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        """Two moments of gradients, ``arrived`` and ``sent`` of each share, over all ranks, the loss scale taken out."""
        columns = [*zip(*pairs, strict=True), [share.arrived for share in shares], [share.sent for share in shares]]
        scale = self._loss_scale()
        sums = self._sum_over_ranks(torch.stack([stack_scalars(list(column)) for column in columns]))
        return sums[0] / scale**2, sums[1] / scale**2, sums[2], sums[3]

    def _norms(self, first: FirstGradient, *sides: Gradients) -> Tensor:
        """‖·‖ over all shares and ranks of each of ``sides``, the loss scale taken out."""
        mesh = self._mesh()
        squares = [
            stack_scalars(
                [norm_squared(share.counted(gradients, mesh)) for share, gradients in zip(first.shares, side, strict=True)]
            ).sum()
            for side in sides
        ]
        return self._sum_over_ranks(stack_scalars(squares)).sqrt() / self._loss_scale()

    def _put_back(self, first: FirstGradient) -> None:
        """Leave the first gradient in ``.grad``, as if there had been no second pass."""
        for parameter, gradient in first.kept:
            parameter.grad = gradient
        for share in first.shares:
            for parameter, gradient in zip(share.parameters, share.gradients, strict=True):
                parameter.grad = gradient
            for parameter in share.absent:  # the second pass may have reached it, and a zero is not the same as nothing
                parameter.grad = None

    def _has_gradient(self, shares: list[Share]) -> bool:
        """Whether there is anything to regularize; the same answer on every rank."""
        return any(share.g1 for share in shares)

    def _sum_over_ranks(self, sums: Tensor) -> Tensor:
        """Sums over this process's tensors, completed over all ranks that hold parts of distributed ones."""
        mesh = self._mesh()
        if mesh is None:
            return sums
        # A rank that owns nothing has made its zeros in some dtype and on the CPU: all must send the same.
        total = sums.to(mesh.device_type, torch.float64)
        for group in mesh.get_all_groups():
            torch.distributed.all_reduce(total, group=group)
        return total

    def _mesh(self) -> DeviceMesh | None:
        return device_mesh(self._parameters())

    @property
    @abstractmethod
    def _overflow_skips_step(self) -> bool:
        """Whether whoever scales the loss skips a step whose gradient is not finite: the combined one has to show it."""
