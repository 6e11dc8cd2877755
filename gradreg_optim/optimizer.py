"""GradRegOptimizer: the regularized step, in phases, around any torch optimizer.

    first gradient → direction (mask, clip) → shift → second gradient → restore → combine → base step

:class:`~gradreg_optim.wrapper.OptimizerWrapper` is the optimizer's outside: groups, state, checkpoints, hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradreg_optim.config import DEFAULT_EPS
from gradreg_optim.finite_difference import (
    Scalar,
    arrival,
    clip_coefficient,
    clipped_moments,
    combine_,
    difference_moments,
    norm_squared,
    ratio,
    readable,
    scale_,
)
from gradreg_optim.gradients import FirstGradient, Share, dense, device_mesh, owned, real, stack_scalars
from gradreg_optim.perturbation import RandomState, batch_norm_statistics_kept, shifted
from gradreg_optim.schedule import Schedule
from gradreg_optim.wrapper import OptimizerWrapper

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["GradRegOptimizer"]

Closure = Callable[[], Any]


class GradRegOptimizer(OptimizerWrapper):
    r"""Gradient regularization around any :class:`torch.optim.Optimizer`.

    Minimises :math:`L(θ) + \frac{γ}{2}‖∇L(θ)‖²` with the finite-difference gradient :math:`g_1 + \frac{γ}{ε}(g_2 − g_1)`,
    :math:`g_1 = ∇L(θ)`, :math:`g_2 = ∇L(θ + ε·g_1)` (arXiv 2602.18037), which it hands to the wrapped optimizer. With
    strength 0 it is that optimizer, bit for bit.

    Args:
        optimizer: any optimizer whose ``step`` needs no closure. Its ``param_groups``, ``state`` and ``defaults`` are
            shared, not copied. A group may bring its own ``gradreg_strength``, ``gradreg_eps`` or ``gradreg_radius``.
        strength: γ ≥ 0, the weight of the penalty. A group of strength 0 is neither perturbed nor regularized.
        eps: ε > 0; the weights move by ``eps`` times the (clipped) gradient.
        radius: ρ > 0, the length ‖θ' − θ‖ itself, from which ``eps = radius/‖d‖`` is derived in each step; ‖d‖ is the
            norm over all regularized parameters. Excludes ``eps``.
        warmup_steps: optimizer steps at the beginning without the penalty.
        schedule: ``"constant"``, ``"linear"`` or ``"cosine"`` (both rise from 0 to 1), or a callable that maps the number
            of the step (from 0) to a factor on the strength. Callables are not part of checkpoints.
        schedule_steps: the steps over which a named schedule rises; in a trainer the default is all of training.
        g1_clip: bound on ‖g1‖, over the regularized parameters, before it is used for anything; ``None``: no bound.
        g2_clip: bound on ‖g2‖ before the difference is taken. A clip that engages biases the difference: ``metrics``
            tell when one did.
        max_penalty_ratio: bound on ‖penalty‖/‖g1‖; shortens the penalty without turning it. ``None``: no bound.
        exclude: parts of parameter names; matching parameters are neither perturbed nor regularized and are updated with
            g1. ``"none"`` leaves nothing out, in trainers either, which otherwise leave out embeddings and heads.
        model: the module, for the names that ``exclude`` matches (an optimizer built on ``named_parameters()`` needs
            none) and for its BatchNorm layers (found by a module hook otherwise, which a compiled *function* never calls:
            give the model if you compile more than the model).
        scaler: the :class:`torch.amp.GradScaler` that scales the closure's loss, if there is one. It then steps the
            wrapped optimizer, so an overflow in either pass skips the step; calling ``scaler.update()`` is left to you.

    Raises:
        TypeError: ``optimizer`` is no optimizer.
        ValueError: a setting breaks its rule; the optimizer is LBFGS or another one that needs a closure; a pattern of
            ``exclude`` matches nothing.

    Source: Ackermann et al. 2026, arXiv 2602.18037; Karakida et al. 2023, arXiv 2210.02720. ``strength == eps`` gives
    un-normalised SAM, and SAM (arXiv 2010.01412) with a radius for which the derived ε equals γ.

    >>> w = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = GradRegOptimizer(torch.optim.SGD([w], lr=0.1), strength=0.5, eps=0.25)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = (2 * w**2).sum()          # gradient 4w, Hessian 4
    ...     loss.backward()
    ...     return loss
    >>> optimizer.step(closure)              # the loss at θ
    tensor(2., grad_fn=<SumBackward0>)
    >>> w.item()                             # 1 − 0.1·(4 + 0.5·4·4)
    -0.2000...
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        strength: float = 1e-3,
        eps: float = DEFAULT_EPS,
        radius: float | None = None,
        warmup_steps: int = 0,
        schedule: str | Schedule | None = None,
        schedule_steps: int | None = None,
        g1_clip: float | None = 10.0,
        g2_clip: float | None = 10.0,
        max_penalty_ratio: float | None = None,
        exclude: str | Iterable[str] = (),
        model: nn.Module | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        super().__init__(
            optimizer,
            {
                "strength": strength,
                "eps": eps,
                "radius": radius,
                "warmup_steps": warmup_steps,
                "schedule": schedule,
                "schedule_steps": schedule_steps,
                "g1_clip": g1_clip,
                "g2_clip": g2_clip,
                "max_penalty_ratio": max_penalty_ratio,
            },
            exclude=exclude,
            model=model,
        )
        self._scaler = scaler
        self._skipped: Scalar = 0
        self._metrics: dict[str, Scalar] = {}

    @property
    def metrics(self) -> dict[str, Scalar]:
        """Figures of the last step: Python numbers, or 0-d tensors that nobody has waited for yet.

        ``strength`` and ``eps`` (of the first regularized group), ``g1_norm``, ``g2_norm`` (before clipping),
        ``penalty_ratio`` = ‖penalty‖/‖g1‖, ``curvature`` = g1·(g2−g1)/(ε‖g1‖²), ``cosine`` of g1 and g2,
        ``perturbation_fidelity`` = ⟨θ'_real − θ, εd⟩/‖εd‖², ``g1_clipped`` and ``g2_clipped`` (1 if the clip engaged),
        and ``skipped``, the number of steps so far whose penalty was left out because a gradient was not finite. A step
        without penalty (strength 0, warm-up) knows ``strength`` and ``skipped`` only.
        """
        return {**self._metrics, "skipped": self._skipped}

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Take one regularized step.

        Args:
            closure: clears the gradients, runs forward and backward over the whole batch (all micro-batches) and returns
                the loss. Called with gradients enabled: twice, or once when the strength is 0 or warming up.

        Returns:
            The loss at θ, as the first call of ``closure`` returned it.

        Raises:
            RuntimeError: no closure, and no trainer attached that provides the second gradient.
        """
        if closure is None:
            return self._step_without_closure()
        closure = self._prepared(closure)
        if not self.regularizes:
            return self._plain_step(closure)
        random = RandomState(self._devices())
        loss = closure()
        self.regularize_(random.replayed()(closure))
        self._base_step()
        return loss

    @torch.no_grad()
    def regularize_(self, second_pass: Closure) -> None:
        """Replace the gradients at θ, which ``.grad`` holds, by the combined ones; ``second_pass`` is run at θ'.

        If ``second_pass`` raises, the weights are at θ again, bit for bit, and ``.grad`` holds the first gradient.
        """
        first = FirstGradient([], [])
        try:
            self._take_gradients(first)
            if not self._choose_step(first):
                self._put_back(first)
                return
            with self._perturbed(first), batch_norm_statistics_kept(self._model):
                second_pass()
        except BaseException:
            self._put_back(first)
            raise
        self._combine(first)

    # The phases. Variants override where gradients and weights live, and how sums run over ranks.

    def _prepared(self, closure: Closure) -> Closure:
        """The closure as each pass calls it."""
        return torch.enable_grad()(closure)

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
                    first.absent.append(parameter)
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
        for share, square, group in zip(shares, squares, self.param_groups, strict=True):
            scale_(share.g1, readable(coefficient))
            share.g1_squared = square * (coefficient * unscale) ** 2
            if group["gradreg_radius"] is not None:
                share.eps = readable(ratio(group["gradreg_radius"], norm * coefficient))
        self._metrics["eps"] = next(share.eps for share in shares if share.strength)
        return True

    @contextmanager
    def _perturbed(self, first: FirstGradient) -> Iterator[None]:
        """Stand at θ' inside the block, at θ again after it; note how much of the step the weights' dtype let through."""
        shares = first.shares
        unscale, mesh = 1.0 / self._loss_scale(), self._mesh()
        steps = [share.eps * unscale for share in shares]
        with shifted([share.weights for share in shares], [share.g1 for share in shares], steps) as at_theta:
            for share, start in zip(shares, at_theta, strict=True):
                arrived, sent = arrival(*(share.counted(x, mesh) for x in (start, share.weights, share.g1)))
                share.arrived, share.sent = arrived * unscale, sent * unscale**2
            yield

    def _second_gradient(self, share: Share, group: dict[str, Any], absent: list[Tensor]) -> list[Tensor]:
        """g2 of one share. A parameter that only one of the two passes reached has a gradient of 0 in the other."""
        late = {id(parameter) for parameter in absent if parameter.grad is not None}
        for parameter in group["params"]:
            if id(parameter) in late:
                share.parameters.append(parameter)
                share.gradients.append(torch.zeros_like(parameter.grad))
                share.g1.append(real(share.gradients[-1]))
        second = []
        for parameter, gradient in zip(share.parameters, share.gradients, strict=True):
            parameter.grad = torch.zeros_like(gradient) if parameter.grad is None else parameter.grad.resolve_conj()
            second.append(real(parameter.grad))
        return second

    def _second_gradients(self, first: FirstGradient) -> list[list[Tensor]]:
        """g2, share by share; excluded parameters get g1 back."""
        shares = first.shares
        for parameter, gradient in first.kept:
            parameter.grad = gradient
        if not any(parameter.grad is not None for share in shares for parameter in share.parameters):
            self._put_back(first)
            raise RuntimeError(
                "The second call of the closure left no gradient on any regularized parameter, the first one did. "
                "Let the closure clear the gradients and run forward and backward each time it is called."
            )
        return [
            self._second_gradient(share, group, first.absent) for share, group in zip(shares, self.param_groups, strict=True)
        ]

    def _combine(self, first: FirstGradient) -> None:
        """Write g1 + (γ/ε)·(g2 − g1) over g2."""
        shares, second = first.shares, self._second_gradients(first)
        inner, squares, arrived, sent = self._moments(shares, second)
        g1_squared, eps = (
            stack_scalars([share.g1_squared for share in shares]),
            stack_scalars([share.eps for share in shares], inner),
        )
        # A sum that cancels may come out below 0, and its root as NaN: clamp, which lets a NaN of the gradients through.
        g2_norm = (g1_squared + 2 * inner + squares).sum().clamp(min=0).sqrt()
        finite = readable(torch.isfinite(g2_norm))
        settings = self.param_groups[0]
        c = clip_coefficient(g2_norm, settings["gradreg_g2_clip"])
        inner, squares = clipped_moments(inner, squares, g1_squared, coefficient=c)

        weights: list[Scalar] = [share.weight for share in shares]
        g1_norm = g1_squared.sum().sqrt()
        penalty = (stack_scalars(weights, inner).square() * squares).sum().sqrt()
        if settings["gradreg_max_penalty_ratio"] is not None:
            limit = settings["gradreg_max_penalty_ratio"] * g1_norm
            bound = torch.where(penalty > limit, limit / penalty, torch.ones_like(penalty))
            weights, penalty = [readable(weight * bound) for weight in weights], penalty * bound
        self._metrics |= {
            "g2_norm": g2_norm,
            "g2_clipped": c < 1,
            "penalty_ratio": ratio(penalty, g1_norm),
            "curvature": ratio(ratio(inner, eps).sum(), g1_squared.sum()),
            "cosine": ratio(g1_squared.sum() + inner.sum(), g1_norm * c * g2_norm),
            "perturbation_fidelity": ratio((eps * arrived).sum(), (eps.square() * sent).sum()),
        }
        if finite is not True:
            self._skipped = self._skipped + (1 if finite is False else (~torch.as_tensor(finite)).long())
        if finite is False and not self._overflow_skips_step:
            self._put_back(first)
            return
        for share, g2, weight in zip(shares, second, weights, strict=True):
            scale_(g2, readable(c))
            combine_(share.g1, g2, weight=weight)
            if isinstance(finite, Tensor) and not self._overflow_skips_step:  # nobody has read it: choose on the device
                for a, b in zip(share.g1, g2, strict=True):
                    torch.where(finite, b, a, out=b)

    def _moments(self, shares: list[Share], second: list[list[Tensor]]) -> tuple[Tensor, ...]:
        """⟨g2 − g1, g1⟩, ‖g2 − g1‖², ``arrived`` and ``sent`` of each share, over all ranks, the loss scale taken out."""
        pairs, mesh = [], self._mesh()
        for share, g2 in zip(shares, second, strict=True):
            g1, g2 = share.counted(share.g1, mesh), share.counted(g2, mesh)
            pairs.append(difference_moments(g1, g2, g1))
        columns = [*zip(*pairs, strict=True), [share.arrived for share in shares], [share.sent for share in shares]]
        scale = self._loss_scale()
        sums = self._sum_over_ranks(torch.stack([stack_scalars(list(column)) for column in columns]))
        return sums[0] / scale**2, sums[1] / scale**2, sums[2], sums[3]

    def _put_back(self, first: FirstGradient) -> None:
        """Leave the first gradient in ``.grad``, as if there had been no second pass."""
        for parameter, gradient in first.kept:
            parameter.grad = gradient
        for share in first.shares:
            for parameter, gradient in zip(share.parameters, share.gradients, strict=True):
                parameter.grad = gradient
        for parameter in first.absent:  # the second pass may have reached it, and a zero is not the same as nothing
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
        return device_mesh(parameter for group in self.param_groups for parameter in group["params"])

    @property
    def _overflow_skips_step(self) -> bool:
        """Whether whoever scales the loss skips a step whose gradient is not finite: the combined one has to show it."""
        return self._scaler is not None and self._scaler.is_enabled()

    def _loss_scale(self) -> float:
        """The factor that ``.grad`` carries: the GradScaler's."""
        return 1.0 if self._scaler is None else float(self._scaler.get_scale())

    def _base_step(self) -> None:
        if self._scaler is None:
            self.optimizer.step()
        else:  # skips the step if it finds an overflow of either pass, which the combined gradient inherits
            self._scaler.step(self.optimizer)
        self._advance()

    def _plain_step(self, closure: Closure) -> Any:
        """A step without penalty: the wrapped optimizer's, with one gradient."""
        loss = closure()
        self._metrics = {"strength": 0.0}
        self._base_step()
        return loss

    def _step_without_closure(self) -> None:
        if self._attachment is not None:
            if not self.regularizes:
                self._metrics = {"strength": 0.0}
            self._attachment.check_consulted()
        elif self._is_state_initialization():
            self.optimizer.step()
            return
        else:
            raise RuntimeError(
                "step() was called without a closure: gradient regularization needs the loss at a second point. "
                "Pass a closure that clears the gradients, runs forward and backward and returns the loss, "
                "or let a Trainer drive the optimizer (optimizers=(optimizer, None); OnlineDPO, NashMD and XPO need "
                "gradreg_optim.attach(trainer) as well)."
            )
        self.optimizer.step()  # whoever drives the loop has unscaled the gradients: under a scaler, it called this step
        self._advance()
