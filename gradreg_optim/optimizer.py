"""GradRegOptimizer: the regularized step around any torch optimizer.

    closure at θ → the phases of :mod:`gradreg_optim.phases`, with the closure at θ' → the wrapped optimizer's step

:class:`~gradreg_optim.wrapper.OptimizerWrapper` is the optimizer's outside: groups, state, checkpoints, hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradreg_optim.between import ReusedPenalty
from gradreg_optim.config import DEFAULT_CLIP, DEFAULT_EPS, check_settings
from gradreg_optim.finite_difference import Scalar
from gradreg_optim.fraction import MicroBatches, PartialDifference
from gradreg_optim.lean import LeanStep
from gradreg_optim.perturbation import RandomState
from gradreg_optim.schedule import Schedule
from gradreg_optim.uncleared import called_on_marked_gradient

__all__ = ["GradRegOptimizer"]

Closure = Callable[[], Any]


class GradRegOptimizer(ReusedPenalty, PartialDifference, LeanStep):
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
        method: ``"forward"``: the formula above, two gradients a step. ``"central"``: (g₊ − g₋)/2 in place of g2 − g1, with
            g± = ∇L(θ ± ε·g1), three gradients; its error falls with ε², and rounding in g1 drops out. ``"exact"``: γ·H·g1
            by double backward, at 2 to 3 gradients' time and several times the memory, for models that can be
            differentiated twice; not under ZeRO or FSDP2.
        rounding: how bfloat16 weights without fp32 masters take the step: ``"stochastic"`` (each weight moves up or down
            with the probability that is right on average) or ``"nearest"`` (as published; steps below half a spacing are
            lost). Other dtypes round to nearest.
        check_every: steps between checks of the difference, which cost two more gradients (central: one). ``metrics`` then
            tell ``self_check`` and ``noise_floor``, and a low self-check is warned about, once. 0: none. ``None``: every
            100 steps where precision is low (half-precision weights, mixed precision of a trainer), else none.
        shrink: scale the penalty by the measured share of signal, 1 − floor²/rel² (:mod:`gradreg_optim.precision`), which
            takes effect where checks are made and nowhere else.
        every: regularize the first step after the warm-up and each ``every``-th from there on; others take one gradient.
            The penalty's mean over steps is then 1/``every`` of what it would be: ``every`` times the strength makes up
            for that, and did in all that was measured.
        between: what the others use. ``"plain"``: g1. ``"reuse"``: g1 and the last penalty, turned to it
            (:mod:`gradreg_optim.between`), at the memory of one gradient, for strengths that cannot be raised; not under
            ZeRO.
        fraction: of a step's micro-batches, how many make the difference, at the cost of 1 + ``fraction`` gradients
            (:mod:`gradreg_optim.fraction`). Needs to know micro-batches: those that a trainer accumulates, or
            :class:`~gradreg_optim.MicroBatches` as the closure.
        memory: ``"full"``: beyond the base step, one copy of the regularized weights and one gradient. ``"lean"``: the
            weights alone; g2 is added to g1 as it arrives (:mod:`gradreg_optim.lean`). That takes float32 gradients, has
            no clip of g2, no ``max_penalty_ratio``, no checks, and estimates for ``metrics``; not with
            DistributedDataParallel or ZeRO.
        exclude: parts of parameter names; matching parameters are neither perturbed nor regularized and are updated with
            g1. ``"none"`` leaves nothing out, in trainers either, which otherwise leave out embeddings and heads.
        resample: in the trainers of GRPO, RLOO and their kin, what the second pass makes of completions drawn at θ:
            ``"reuse"``, as published; ``"importance"`` reweights them by the loss's own ratio, ``"sequence"`` by that of
            whole completions, as if they were drawn at θ' (:mod:`gradreg_optim.resample`).
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
        g2_clip: float | None = DEFAULT_CLIP,
        max_penalty_ratio: float | None = None,
        method: str = "forward",
        rounding: str = "stochastic",
        check_every: int | None = None,
        shrink: bool = True,
        every: int = 1,
        between: str = "plain",
        fraction: float = 1.0,
        memory: str = "full",
        exclude: str | Iterable[str] = (),
        resample: str = "reuse",
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
                "method": method,
                "rounding": rounding,
                "check_every": check_every,
                "shrink": shrink,
                "every": every,
                "between": between,
                "fraction": fraction,
                "memory": memory,
            },
            exclude=exclude,
            model=model,
        )
        check_settings(resample=resample)
        self.resample = resample
        self._scaler = scaler
        self._skipped: Scalar = 0
        self._metrics: dict[str, Scalar] = {}
        self._admonished = False
        self._is_seen_to_clear = False
        self._fresh: dict[Tensor, Tensor] = {}
        self._stateless: dict[Tensor, Tensor] = {}

    @property
    def metrics(self) -> dict[str, Scalar]:
        """Figures of the last step: Python numbers, or 0-d tensors that nobody has waited for yet.

        ``strength`` and ``eps`` (of the first regularized group), ``g1_norm``, ``g2_norm`` (before clipping),
        ``penalty_ratio`` = ‖penalty‖/‖g1‖, ``curvature`` = g1·(g2−g1)/(ε‖g1‖²), ``cosine`` of g1 and g2,
        ``perturbation_fidelity`` = ⟨θ'_real − θ, εd⟩/‖εd‖², ``g1_clipped`` and ``g2_clipped`` (1 if the clip engaged),
        and ``skipped``, the number of steps so far whose penalty was left out because a gradient was not finite. A step
        without penalty (strength 0, warm-up) knows ``strength`` and ``skipped`` only. Where checks are made: the
        ``noise_floor`` last measured, the ``signal`` left above it, and, in the step of a check, ``self_check``, the cosine
        of the differences ahead and behind (:mod:`gradreg_optim.precision`). ``method="exact"`` has no ε, no g2 and none
        of their figures.
        """
        return {**self._metrics, "skipped": self._skipped}

    @torch.no_grad()
    def step(self, closure: Closure | MicroBatches | None = None) -> Any:
        """Take one regularized step.

        Args:
            closure: clears the gradients, runs forward and backward over the whole batch (all micro-batches) and returns
                the loss. Called with gradients enabled: twice, or once in a step that is not regularized; three times
                for ``method="central"``; in the step of a check four times. Or :class:`~gradreg_optim.MicroBatches`.

        Returns:
            The loss at θ, as the first call of ``closure`` returned it.

        Raises:
            RuntimeError: no closure, and no trainer attached that provides the second gradient; or ``fraction`` is less
                than 1, and the closure is one that runs whole steps only.
        """
        if closure is None:
            return self._step_without_closure()
        self._check_closure(closure)
        if isinstance(closure, MicroBatches):
            return self._step_in_parts(closure)
        closure = self._prepared(closure)
        if not self.regularizes:
            return self._plain_step(closure)
        random = RandomState(self._devices())
        loss = self._first_call(closure)
        self.regularize_(random.replayed()(closure))
        self._base_step()
        return loss

    def _first_call(self, closure: Closure) -> Any:
        """The closure at θ; the first one that finds gradients is seen to clear them."""
        if self._is_seen_to_clear:
            return closure()
        loss, self._is_seen_to_clear = called_on_marked_gradient(closure, self._parameters())
        return loss

    def _check_closure(self, closure: Closure | MicroBatches) -> None:
        """Refuse settings that a step with this closure cannot honour."""
        fraction = self.param_groups[0]["gradreg_fraction"]
        if fraction < 1 and not isinstance(closure, MicroBatches):
            raise RuntimeError(
                f"fraction={fraction!r} takes the difference on some micro-batches of a step; this closure runs them all. "
                "Pass optimizer.step(gradreg_optim.MicroBatches(backward, batches)), or leave fraction at 1."
            )
        if self.resample != "reuse":
            raise RuntimeError(
                f"resample={self.resample!r}: completions are reweighted in the losses of trainers, and this step got a "
                "closure, which decides itself what its second call makes of them. Keep the log-probabilities of its first "
                "call there, and leave resample out."
            )

    def _prepared(self, closure: Closure) -> Closure:
        """The closure as each pass calls it."""
        return torch.enable_grad()(closure)

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
        """A step of one gradient: the wrapped optimizer's, or one that uses the last penalty again."""
        loss = closure()
        self._metrics = {"strength": 0.0}
        if self.reuses:
            self.reuse_()
        self._base_step()
        return loss

    def _step_without_closure(self) -> None:
        if self._is_state_initialization():
            self.optimizer.step()
            return
        if self._attachment is not None:
            if not self.regularizes and not self.reuses:
                self._metrics = {"strength": 0.0}
            self._attachment.check_consulted()
        else:
            raise RuntimeError(
                "step() was called without a closure: gradient regularization needs the loss at a second point. "
                "Pass a closure that clears the gradients, runs forward and backward and returns the loss, "
                "or let a Trainer drive the optimizer (optimizers=(optimizer, None); OnlineDPO, NashMD and XPO need "
                "gradreg_optim.attach(trainer) as well)."
            )
        self.optimizer.step()  # whoever drives the loop has unscaled the gradients: under a scaler, it called this step
        self._advance()
