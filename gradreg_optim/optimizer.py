"""GradRegOptimizer: the regularized step around any torch optimizer.

The algorithm is :func:`gradreg_optim.core.regularize.regularized`; here it is driven by a closure or by the
caller's own ``for``, and followed by the wrapped optimizer's step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from gradreg_optim.core.local import LocalStorage
from gradreg_optim.core.module_state import ModuleState
from gradreg_optim.core.plan import Plan
from gradreg_optim.core.replicas import Part, Replicas, has_ranks
from gradreg_optim.core.same_start import Clearing, HeldClips, same_start
from gradreg_optim.core.step import Figure, Outcome, Point, Scalar, averaged, computed
from gradreg_optim.core.storage import Storage
from gradreg_optim.core.witnesses import Losses, Witnesses
from gradreg_optim.passes import Passes, Progress, call_in_each, marks_of_gradients, require_idle
from gradreg_optim.wrapping import upwards
from gradreg_optim.wrapping.groups import agree, settle_groups
from gradreg_optim.wrapping.refusals import (
    check_complete,
    check_engines,
    check_micro_batches,
    check_resample,
    no_gradient,
)
from gradreg_optim.wrapping.schedule import Schedule, ScheduleName
from gradreg_optim.wrapping.settings import (
    Method,
    NormOf,
    Radius,
    Resample,
    Rounding,
    Strength,
    check_names,
    settings_among,
)
from gradreg_optim.wrapping.wrapper import OptimizerWrapper

SEEDS, OF_SEEDS = 999_983, 2**22
"""How far apart the seeds of rounding in one micro-batch and the next are, among how many."""


class GradRegOptimizer(OptimizerWrapper):
    r"""Gradient regularization around any :class:`torch.optim.Optimizer`.

    Minimises :math:`L(θ) + \frac{γ}{2}‖∇L(θ)‖²`. The wrapped optimizer steps on
    :math:`g_1 + \frac{γ}{ε}(g_2 − g_1)`, where :math:`g_1 = ∇L(θ)` and :math:`g_2 = ∇L(θ + ε·g_1)` (arXiv
    2602.18037). With strength 0 the wrapper is the wrapped optimizer, bit for bit.

    Args:
        optimizer: any optimizer whose ``step`` needs no closure. The wrapper shares its ``param_groups``,
            ``state`` and ``defaults``. A group may bring its own ``gradreg_strength``, ``gradreg_eps`` or
            ``gradreg_radius``.
        strength: γ ≥ 0, the weight of the penalty. ``"auto"`` finds it in the first ten regularized steps
            (:mod:`gradreg_optim.core.strength`), and then keeps it. A group of strength 0 is neither
            perturbed nor regularized.
        eps: ε > 0; the weights move by ``eps`` times the clipped gradient. Default: the published 1e-3 in
            full precision, ``radius="auto"`` in low precision, which the first regularized step finds out.
        radius: ρ > 0, the length ‖θ' − θ‖ over all regularized parameters; each step uses
            ``eps = radius/‖g1‖``. ``"auto"`` adapts it (:mod:`gradreg_optim.core.precision`).
        warmup_steps: optimizer steps at the beginning without the penalty.
        schedule: ``"constant"``, ``"linear"`` or ``"cosine"`` (both rise from 0 to 1), or a
            callable that maps the number of the step, from 0, to a factor on the strength.
            Checkpoints do not contain callables.
        schedule_steps: the steps over which a named schedule rises. Default in a trainer: all of training.
        g1_clip: bound on ‖g1‖ over the regularized parameters. ``None``: no bound.
        g2_clip: bound on ‖g2‖. A clip that engages biases the difference.
        max_penalty_ratio: bound on ‖penalty‖/‖g1‖. It shortens the penalty and keeps its direction.
            ``None``: no bound.
        method: ``"forward"``: the formula above, two gradients a step. ``"central"``: (g₊ − g₋)/2 in
            place of g2 − g1, where g± = ∇L(θ ± ε·g1); three gradients, an error of order ε², and
            rounding in g1 cancels.
        rounding: how bfloat16 weights without fp32 masters take the step. ``"stochastic"`` rounds each weight
            up or down with the probability that is right on average; ``"nearest"``, as published, loses steps
            below half a spacing.
        check_every: number of steps between two checks of the difference, at two more gradients each
            (central: one). They add ``self_check`` and ``noise_floor`` to ``metrics``. 0: none. ``None``: one
            in the first regularized step, and in low precision one every 100 steps.
        shrink: in low precision, multiply the penalty by its share of signal, 1 − floor²/rel²,
            which checks measure.
        every: regularize every ``every``-th step, beginning with the first after the warm-up. Multiply
            ``strength`` by ``every`` to compensate; this worked in every experiment we ran.
        exclude: parts of parameter names. Matching parameters are neither perturbed nor regularized; their
            update uses g1. ``"none"`` excludes nothing. Default in trainers: embeddings and heads.
        norm_of: whose gradient has the norm. ``"step"``: the whole step's, as published; the penalty on the
            gradient's noise fades with the batch. ``"micro_batch"``: each micro-batch's, on average: it
            stays. γ is in proportion to the samples of a micro-batch. Default: ``"micro_batch"`` in trainers,
            elsewhere ``"step"``; see :meth:`passes`.
        resample: in trainers of GRPO and RLOO, the completions of the second pass. ``"reuse"``: as they are,
            as published. ``"sequence"``: reweighted by the ratio of whole completions
            (:mod:`gradreg_optim.trainers.old_policy`). Default: ``"sequence"`` where the loss allows it.
        model: the module, for the names in ``exclude`` and for its buffers. Not needed if the optimizer
            was built on ``named_parameters()``, unless you compile more than the model: otherwise module
            hooks find all modules.
        scaler: the :class:`torch.amp.GradScaler` that scales the closure's loss. It steps the wrapped
            optimizer and skips the step if either pass overflowed. Call ``scaler.update()`` yourself. To
            clip, see :meth:`passes`.

    Raises:
        TypeError, ValueError: a setting breaks its rule, ``optimizer`` is none or needs a closure, or a
            pattern of ``exclude`` matches nothing.

    Source: Ackermann et al. 2026, arXiv 2602.18037; Karakida et al. 2023, arXiv 2210.02720.
    ``strength == eps`` gives un-normalised SAM; with a radius, SAM itself (arXiv 2010.01412) where the
    derived ε equals γ.

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
        strength: Strength = "auto",
        eps: float | None = None,
        radius: Radius = None,
        warmup_steps: int = 0,
        schedule: ScheduleName | Schedule | None = None,
        schedule_steps: int | None = None,
        g1_clip: float | None = 10.0,
        g2_clip: float | None = 10.0,
        max_penalty_ratio: float | None = None,
        method: Method = "forward",
        rounding: Rounding = "stochastic",
        check_every: int | None = None,
        shrink: bool = True,
        every: int = 1,
        exclude: str | Iterable[str] = (),
        norm_of: NormOf = None,
        resample: Resample = None,
        model: nn.Module | None = None,
        scaler: torch.amp.GradScaler | None = None,
        **unknown: Any,
    ) -> None:
        check_names(type(self).__name__, unknown)
        self._set_up(optimizer, settings_among(locals()), scaler=scaler, exclude=exclude, model=model)

    def _set_up(self, optimizer: Optimizer, settings: dict[str, Any], **more: Any) -> None:
        super().__init__(optimizer, settings, **more)
        self.resample, self.norm_of, self.witnesses = settings["resample"], settings["norm_of"], Witnesses()
        self.progress = Progress()
        self._module_state, self._losses = ModuleState(), Losses()
        self._clips, self._clearing, self._replicas = HeldClips(), Clearing(), Replicas()

    @property
    def metrics(self) -> dict[str, Scalar]:
        """Figures of the last step: Python numbers or 0-d tensors; only reading a tensor waits.

        ``strength`` and ``eps`` of the first regularized group; ``radius``, if it adapts; ``g1_norm``,
        ``g2_norm`` before clipping; ``g1_clipped``, ``g2_clipped``: 1 if the clip engaged;
        ``penalty_ratio`` = ‖penalty‖/‖g1‖; ``curvature`` = g1·(g2−g1)/(ε‖g1‖²); ``cosine`` of g1 and g2;
        ``perturbation_fidelity`` = ⟨θ'_real − θ, εd⟩/‖εd‖²; ``loss_check`` = (L(θ') − L(θ))/(ε·⟨d,
        (g1+g2)/2⟩), near 1 in a right step, unless the loss is not the integral of its gradient; ``skipped``:
        steps so far whose penalty was left out because a gradient was not finite, or the loss not the same
        function in both passes. With checks (:mod:`gradreg_optim.core.precision`) ``noise_floor``, ``signal``
        and ``self_check``. A step without penalty has ``strength`` and ``skipped`` alone.
        """
        self.witnesses.look()
        return {name: computed(figure) for name, figure in self.figures().items()}

    def figures(self) -> dict[str, Figure]:
        """:attr:`metrics` that are yet to be computed, for loggers that do not log each step."""
        return {**self.progress.figures, "skipped": self.progress.skipped}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one regularized step; returns the loss at θ, as the first call of ``closure`` returned it.

        Args:
            closure: clears the gradients, runs forward and backward over the whole batch and returns the
                loss. It is called with gradients enabled: twice; once in a step without penalty; three times
                for ``method="central"``; four times in the step of a check, such as the first regularized
                one; once more there if it wrote the weights, and once more if its loss seems not to be
                repeatable. ``None`` after :meth:`passes`.

        Raises:
            RuntimeError: there is no closure, no completed :meth:`passes` and no attached trainer; or the
                loss is another one at each call.
        """
        was_under_way = self.progress.abandon()
        if closure is None or self.progress.is_complete:
            return self._step_on_gradients(was_under_way, closure)
        check_resample(self.resample)
        with closing(self.begin()) as passes:
            loss, is_whole = call_in_each(closure, passes, upwards.calling_scaler)
        if not is_whole:
            self.note(Outcome({"strength": 0.0}, 1))
            return self._advance()
        self._base_step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parameters, as the wrapped optimizer does.

        In a pass over a micro-batch that is its gradient; between two of them the step begins again.
        """
        if self.progress.outcomes and not self.progress.is_under_way:
            self.progress.outcomes.clear()
        self.optimizer.zero_grad(set_to_none)

    def passes(self, micro_batches: int = 1) -> Iterator[Point]:
        """The passes of one step, for loops that cannot hand over a closure.

        ::

            for _ in optimizer.passes():     # at θ and at θ'; once in a step without penalty
                optimizer.zero_grad()
                compute_loss().backward()
            # with a scaler: scaler.unscale_(optimizer)
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()                 # on the combined gradient

        Every pass starts from the same random numbers and module states. After the loop the weights are at θ
        and ``.grad`` holds the combined gradient. If the body raises, or leaves the loop by ``break``, the
        weights are at θ, bit for bit, and ``.grad`` holds g1; the step then has to be begun again.

        With micro-batches the loop runs once for each of them, and the penalty is the mean of theirs,
        (γ/2)·(1/n)·Σ‖n·∇ℓ_i‖², where the step's loss is L = Σ ℓ_i::

            for batch in micro_batches:                      # n of them
                for _ in optimizer.passes(micro_batches=n):
                    optimizer.zero_grad()                    # clears the gradient of this one alone
                    (compute_loss(batch) / n).backward()
            optimizer.step()

        After each loop ``.grad`` holds the sum so far; one that is left early has to be begun again. Under
        DistributedDataParallel a rank's own gradient counts, and gradients are reduced once, after the last
        loop; under FSDP2 and ZeRO the micro-batch is that of all ranks.

        Raises:
            RuntimeError: ``resample`` is set, which a loop body cannot serve; see also :meth:`step`.
            ValueError: ``micro_batches`` is no integer >= 1, not the number that this step began with, or
                more than 1 although ``norm_of="step"``.
        """
        check_resample(self.resample)
        self.progress.abandon()
        done = len(self.progress.outcomes)
        is_whole = not done or marks_of_gradients(self.param_groups) == self.progress.marks
        check_micro_batches(micro_batches, done, self.progress.micro_batches, self.norm_of, is_whole)
        if self.progress.is_complete and self._scaler is None:  # a scaler skips steps
            self.witnesses.tell(
                "steps",
                "passes() began again before optimizer.step(): warm-up, schedule and every stand still",
                "a step of the optimizer inside, or none, after the loop over passes()",
                "call step() of the wrapper, once after each loop over passes()",
            )
        passes = self.begin(completes=True, micro_batches=micro_batches, is_apart=micro_batches > 1)
        self.progress.passes, self.progress.is_complete = weakref.ref(passes), False
        return passes

    def begin(
        self,
        surroundings: Callable[[Point], AbstractContextManager[Any]] | None = None,
        *,
        completes: bool = False,
        micro_batches: int = 1,
        is_apart: bool = False,
    ) -> Passes:
        """Begin the next of a step's ``micro_batches``: its passes, each inside ``surroundings``.

        ``completes``: a ``step()`` will follow the last. ``is_apart``: a norm is that of one, on this rank.
        """
        outcomes = self.progress.outcomes
        if len(outcomes) >= micro_batches or not is_apart:
            outcomes.clear()
        self.progress.micro_batches = micro_batches
        part = Part(
            len(outcomes),
            micro_batches,
            is_apart or (self.norm_of == "micro_batch" and self._attachment is None),
            may_be_empty=len(outcomes) < micro_batches - 1 or not all(o.is_empty for o in outcomes),
            replicas=self._replicas,
        )
        self._replicas.waiting.clear()
        storage, plan = self.storage(part), self.plan()
        self.progress.is_checked = plan.is_checked if part.number == 0 else self.progress.is_checked
        if part.number and plan.points:  # one check a step, and other rounding errors in each
            seed = (plan.step + part.number * SEEDS) % OF_SEEDS
            plan = replace(plan, points=plan.scheme.points, step=seed)
        if plan.points and not self.progress.is_proven and has_ranks():
            check_engines(self.param_groups)
        self._module_state.own(p for group in self._groups_with_names() for p in group["params"])
        losses = self._losses.begun(self._module_state.modules, self._replicas.waiting)
        around = self.surroundings(storage, plan) if surroundings is None else surroundings

        def end(outcome: Outcome) -> None:
            self._module_state.forget()
            self._remember(outcome)
            self.progress.is_proven = self.progress.is_proven or outcome.symptoms is not None
            outcomes.append(outcome)
            if len(outcomes) < micro_batches:
                self.progress.marks = marks_of_gradients(self.param_groups)
                return
            if self._replicas.waiting and plan.points:
                is_read = plan.is_low is None or self.progress.is_checked
                agree(self.param_groups, self._replicas, is_read=is_read)
            self._replicas.reduce()
            self.note(outcome if micro_batches == 1 else averaged(outcomes))
            outcomes.clear()
            if plan.points and plan.settling is not None:
                settle_groups(self.param_groups)
            if self._clips.pending:
                self._clips.apply(self._clips.pending)
            if completes:
                self._end_loop()

        return Passes(plan, storage, losses, around, end, part)

    def note(self, outcome: Outcome) -> None:
        """Take in what a step did: its metrics, and what a check found."""
        self.progress.figures = outcome.figures
        self.progress.skipped = self.progress.skipped + outcome.skipped
        self.witnesses.note(outcome)
        if outcome.is_empty and self._attachment is None:  # a trainer's attachment has its own check
            self.witnesses.warn(
                "empty", no_gradient(self.param_groups, self.exclude, self.exclusion.positions)
            )

    def storage(self, part: Part) -> Storage:
        """Where gradients and weights are in the step to come: ``.grad`` and the parameters."""
        optimizers, is_first = (self, self.optimizer), not self.progress.is_proven
        return LocalStorage(self.param_groups, self._scaler, optimizers, is_first=is_first, part=part)

    def surroundings(self, storage: Storage, plan: Plan) -> Callable[[Point], AbstractContextManager[Any]]:
        """What is around each pass of one step, so that all of them are passes of the same function."""
        if not plan.points:
            return lambda _point: nullcontext()

        def parameters() -> Iterator[torch.Tensor]:
            return (parameter for group in self.param_groups for parameter in group["params"])

        note, clips = self._losses.note, self._clips
        return same_start(
            storage.devices, self._model, self._module_state, note, clips, self._clearing, parameters
        )

    def _base_step(self) -> None:
        """The wrapped optimizer's step on the combined gradient; under a scaler, unless a pass overflowed."""
        scaler: Any = self._scaler
        if scaler is None or not scaler.is_enabled():
            self._step_wrapped(self.optimizer.step)
        elif not (found := scaler._found_inf_per_device(self)):
            # Nobody has called scaler.unscale_ on the wrapper.
            self._step_wrapped(scaler.step, self.optimizer)
        elif not any(is_infinite.item() for is_infinite in found.values()):
            self._step_wrapped(self.optimizer.step)
        self._advance()

    def _end_loop(self) -> None:
        """After a loop over :meth:`passes`: leave the step to the caller."""
        self.progress.is_complete = True

    def _step_on_gradients(self, was_under_way: bool, closure: Callable[[], Any] | None = None) -> None:
        """A step without a closure: after :meth:`passes`, or in the hands of a trainer.

        After :meth:`passes` a closure may come that leaves the gradients alone, as in Lightning's
        manual optimization.
        """
        check_complete(len(self.progress.outcomes), self.progress.micro_batches, was_under_way)
        if self.progress.is_complete:
            self.progress.is_complete = False
            if closure is not None:
                require_idle(closure, self.param_groups)
            upwards.check_scaler(self._scaler)
            self._base_step()
        elif self._is_state_initialization():
            self._step_wrapped(self.optimizer.step)
        elif self._attachment is not None:
            self._attachment.check_consulted()
            self._step_wrapped(self.optimizer.step)  # whoever drives the loop has unscaled the gradients
            self._advance()
        else:
            raise RuntimeError(
                "step() was called without a closure: gradient regularization needs the loss at a second "
                "point. Pass a closure that clears the gradients, runs forward and backward and returns "
                "the loss, or run both in `for _ in optimizer.passes():` before step(), or let a Trainer "
                "drive the optimizer (optimizers=(optimizer, None), or gradreg_optim.attach(trainer) if "
                "the trainer creates it)."
            )
