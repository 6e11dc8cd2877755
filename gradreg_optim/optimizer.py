"""GradRegOptimizer: the regularized step around any torch optimizer.

The algorithm is :func:`gradreg_optim.core.regularize.regularized`; here it is driven by a closure, by
:class:`~gradreg_optim.MicroBatches` or by the caller's own ``for``, and followed by the wrapped optimizer's step.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from gradreg_optim.core.local import LocalStorage
from gradreg_optim.core.losses import Clearing, Losses
from gradreg_optim.core.plan import Plan
from gradreg_optim.core.regularize import call_in_each, regularized
from gradreg_optim.core.repeatable import Buffers, same_start
from gradreg_optim.core.step import Figure, Outcome, PartOfPass, Point, Scalar, computed
from gradreg_optim.core.storage import Storage
from gradreg_optim.drivers.micro_batches import MicroBatches
from gradreg_optim.wrapping import upwards
from gradreg_optim.wrapping.advice import Advice
from gradreg_optim.wrapping.refusals import check_driver, no_gradient
from gradreg_optim.wrapping.schedule import Schedule, ScheduleName
from gradreg_optim.wrapping.settings import DEFAULT_EPS, DEFAULT_STRENGTH, Method, Radius, Resample, Rounding, settings_among
from gradreg_optim.wrapping.wrapper import OptimizerWrapper

Passes = Generator[Point, PartOfPass | None, None]


class GradRegOptimizer(OptimizerWrapper):
    r"""Gradient regularization around any :class:`torch.optim.Optimizer`.

    Minimises :math:`L(θ) + \frac{γ}{2}‖∇L(θ)‖²`. The wrapped optimizer steps on :math:`g_1 + \frac{γ}{ε}(g_2 − g_1)`, where
    :math:`g_1 = ∇L(θ)` and :math:`g_2 = ∇L(θ + ε·g_1)` (arXiv 2602.18037). With strength 0 the wrapper is the wrapped
    optimizer, bit for bit.

    Args:
        optimizer: any optimizer whose ``step`` needs no closure. The wrapper shares its ``param_groups``, ``state`` and
            ``defaults``. A group may bring its own ``gradreg_strength``, ``gradreg_eps`` or ``gradreg_radius``.
        strength: γ ≥ 0, the weight of the penalty. A group of strength 0 is neither perturbed nor regularized.
        eps: ε > 0; the weights move by ``eps`` times the clipped gradient.
        radius: ρ > 0, the length ‖θ' − θ‖ over all regularized parameters; each step uses ``eps = radius/‖g1‖``. ``"auto"``
            finds it (:mod:`gradreg_optim.core.radius`): the default in half precision, unless ``eps`` is given.
        warmup_steps: optimizer steps at the beginning without the penalty.
        schedule: ``"constant"``, ``"linear"`` or ``"cosine"`` (both rise from 0 to 1), or a callable that maps the number of
            the step, from 0, to a factor on the strength. Checkpoints do not contain callables.
        schedule_steps: the steps over which a named schedule rises. Default in a trainer: all of training.
        g1_clip: bound on ‖g1‖ over the regularized parameters. ``None``: no bound.
        g2_clip: bound on ‖g2‖. A clip that engages biases the difference.
        max_penalty_ratio: bound on ‖penalty‖/‖g1‖. It shortens the penalty and keeps its direction. ``None``: no bound.
        method: ``"forward"``: the formula above, two gradients a step. ``"central"``: (g₊ − g₋)/2 in place of g2 − g1, where
            g± = ∇L(θ ± ε·g1); three gradients, an error of order ε², and rounding in g1 cancels. ``"exact"``: γ·H·g1 by
            double backward, at the time of 2 to 3 gradients and several times the memory; not under ZeRO or FSDP2.
        rounding: how bfloat16 weights without fp32 masters take the step. ``"stochastic"`` rounds each weight up or down
            with the probability that is right on average; ``"nearest"``, as published, loses steps below half a spacing.
        check_every: number of steps between two checks of the difference, at two more gradients each (central: one). They
            add ``self_check`` and ``noise_floor`` to ``metrics``. 0: none. ``None``: 100 in half precision, else 0.
        shrink: multiply the penalty by its share of signal, 1 − floor²/rel², which checks measure.
        every: regularize every ``every``-th step, beginning with the first after the warm-up. Multiply ``strength`` by
            ``every`` to compensate; this worked in every experiment we ran.
        fraction: the fraction of a step's micro-batches that are repeated, at the cost of 1 + ``fraction`` gradients
            (:mod:`gradreg_optim.drivers.micro_batches`). Works in trainers and with :class:`~gradreg_optim.MicroBatches`.
        exclude: parts of parameter names. Matching parameters are neither perturbed nor regularized; their update uses g1.
            ``"none"`` excludes nothing. Default in trainers: embeddings and heads.
        resample: in trainers of GRPO and RLOO, the completions of the second pass. ``"reuse"``: as they are, as published.
            ``"importance"``, ``"sequence"``: reweighted by the loss's own ratio, or by that of whole completions
            (:mod:`gradreg_optim.trainers.old_policy`).
        model: the module, for the names in ``exclude`` and for its buffers. Not needed if the optimizer was built on
            ``named_parameters()``, unless you compile more than the model: otherwise module hooks find all buffers.
        scaler: the :class:`torch.amp.GradScaler` that scales the closure's loss. It steps the wrapped optimizer and skips
            the step if either pass overflowed. Call ``scaler.update()`` yourself. To clip, see :meth:`passes`.

    Raises:
        TypeError, ValueError: a setting breaks its rule, ``optimizer`` is none or needs a closure, or a pattern of
            ``exclude`` matches nothing.

    Source: Ackermann et al. 2026, arXiv 2602.18037; Karakida et al. 2023, arXiv 2210.02720. ``strength == eps`` gives
    un-normalised SAM; with a radius, SAM itself (arXiv 2010.01412) where the derived ε equals γ.

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
        strength: float = DEFAULT_STRENGTH,
        eps: float = DEFAULT_EPS,
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
        fraction: float = 1.0,
        exclude: str | Iterable[str] = (),
        resample: Resample = "reuse",
        model: nn.Module | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self._set_up(optimizer, settings_among(locals()), scaler=scaler, exclude=exclude, model=model)

    def _set_up(self, optimizer: Optimizer, settings: dict[str, Any], **more: Any) -> None:
        super().__init__(optimizer, settings, **more)
        self.resample, self.advice = settings["resample"], Advice()
        self._figures: dict[str, Figure] = {}
        self._skipped: Scalar = 0
        self._clearing, self._buffers, self._losses = Clearing(), Buffers(), Losses()
        self._noting: Losses | None = None  # the same, in steps in which it has something to do
        self._running: weakref.ref[Passes] | None = None  # of the loop over passes() that began last
        self._pending: Callable[[], None] | None = None  # what a step() after that loop does

    @property
    def metrics(self) -> dict[str, Scalar]:
        """Figures of the last step: Python numbers, or 0-d tensors; only reading a tensor waits for the device.

        ``strength`` and ``eps`` of the first regularized group; ``radius``, if it finds itself; ``g1_norm``, ``g2_norm``
        before clipping; ``g1_clipped``, ``g2_clipped``: 1 if the clip engaged; ``penalty_ratio`` = ‖penalty‖/‖g1‖;
        ``curvature`` = g1·(g2−g1)/(ε‖g1‖²); ``cosine`` of g1 and g2; ``perturbation_fidelity`` = ⟨θ'_real − θ, εd⟩/‖εd‖²;
        ``skipped``: steps so far whose penalty was left out because a gradient was not finite. With checks
        (:mod:`gradreg_optim.core.self_check`) ``noise_floor``, ``signal`` and ``self_check``. A step without penalty has
        ``strength`` and ``skipped`` alone.
        """
        return {name: computed(figure) for name, figure in self.figures().items()}

    def figures(self) -> dict[str, Figure]:
        """:attr:`metrics` that are yet to be computed, for loggers that do not log each step."""
        return {**self._figures, "skipped": self._skipped}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | MicroBatches | None = None) -> Any:
        """Take one regularized step; returns the loss at θ, as the first call of ``closure`` returned it.

        Args:
            closure: clears the gradients, runs forward and backward over the whole batch and returns the loss. It is called
                with gradients enabled: twice; once in a step without penalty; three times for ``method="central"``; four
                times in the step of a check; once more in the first step if its loss seems not to be repeatable. Or
                :class:`~gradreg_optim.MicroBatches`. ``None`` after :meth:`passes`.

        Raises:
            RuntimeError: there is no closure, no completed :meth:`passes` and no attached trainer; the closure runs whole
                steps, and ``fraction`` is less than 1; or the loss is another one at each call.
        """
        was_under_way = self._abandon_passes()
        if closure is None:
            return self._step_on_gradients(was_under_way)
        plan = self.plan(storage := self.storage())
        if plan.fraction < 1 or self.resample != "reuse":
            check_driver(plan, self.resample, "" if isinstance(closure, MicroBatches) else "this closure runs them all")
        with closing(self._passes(plan, storage)) as passes:
            if isinstance(closure, MicroBatches):
                loss, is_whole = closure.drive(passes, storage, plan, self._buffers), True
            else:
                loss, is_whole = call_in_each(closure, passes, self._returned, upwards.calling_scaler)
        if not is_whole:
            self.note(Outcome({"strength": 0.0}, 1))
            return self._advance()
        self._base_step()
        return loss

    def passes(self) -> Passes:
        """The passes of one step, for loops that cannot hand over a closure.

        ::

            for _ in optimizer.passes():     # at θ and at θ'; once in a step without penalty
                optimizer.zero_grad()
                compute_loss().backward()
            clip_grad_norm_(model.parameters(), 1.0)    # under a scaler, call scaler.unscale_(optimizer) before
            optimizer.step()                 # on the combined gradient

        Every pass starts from the same random numbers and buffers. After the loop the weights are at θ and ``.grad`` holds
        the combined gradient. If the body raises, or leaves the loop by ``break``, the weights are at θ, bit
        for bit, and ``.grad`` holds g1; the step then has to be begun again.

        Raises:
            RuntimeError: ``fraction`` or ``resample`` are set, which a loop body cannot serve; see also :meth:`step`.
        """
        plan = self.plan(storage := self.storage())
        if plan.fraction < 1 or self.resample != "reuse":
            check_driver(plan, self.resample, "the body of this loop runs them all")
        self._abandon_passes()
        passes = self._passes_of_loop(plan, storage)
        self._running = weakref.ref(passes)
        return passes

    def _passes_of_loop(self, plan: Plan, storage: Storage) -> Passes:
        yield from self._passes(plan, storage)
        self._end_loop()

    def _passes(self, plan: Plan, storage: Storage) -> Passes:
        """Yield each point with everything prepared for the pass there; afterwards note what came out."""
        self._pending = None
        is_checked = self._losses.is_due or len(plan.points) > len(plan.scheme.points)
        self._noting = self._losses.begun(self._buffers.modules) if is_checked else None
        surroundings, part = self.surroundings(storage, plan), None
        with closing(regularized(storage, plan, self._noting)) as points:
            while True:
                try:
                    point = points.send(part)
                except StopIteration as end:
                    self.note(end.value)
                    return
                with surroundings(point):
                    part = yield point

    def _returned(self, loss: Any) -> Any:
        return loss if self._noting is None else self._noting.returned(loss)

    def _abandon_passes(self) -> bool:
        """Bring the weights back if :meth:`passes` stand at a point; whether they did."""
        passes = None if self._running is None else self._running()
        if passes is None or inspect.getgeneratorstate(passes) == inspect.GEN_CLOSED:
            return False
        passes.close()
        return True

    def note(self, outcome: Outcome) -> None:
        """Take in what a step did: its metrics, and what a check found."""
        self._figures = outcome.figures
        self._skipped = self._skipped + outcome.skipped
        self._remember(outcome)
        self.advice.note(outcome)
        if outcome.is_empty and self._attachment is None:  # a trainer's attachment has its own check
            self.advice.tell("empty", no_gradient(self.param_groups, self.exclude, self._excluded))

    def storage(self) -> Storage:
        """Where gradients and weights are in the step to come: ``.grad`` and the parameters."""
        return LocalStorage(self.param_groups, self._scaler, (self, self.optimizer))

    def surroundings(self, storage: Storage, plan: Plan) -> Callable[[Point], AbstractContextManager[Any]]:
        """What is around each pass of one step, so that all of them are passes of the same function."""
        if not plan.points:
            return lambda _point: nullcontext()
        parameters = (parameter for group in self.param_groups for parameter in group["params"])
        first = nullcontext() if self._clearing.is_seen else self._clearing.required(parameters)
        return same_start(storage.devices, self._model, self._buffers, self._noting, first)

    def _base_step(self) -> None:
        """The wrapped optimizer's step on the combined gradient; under a scaler, unless a pass overflowed."""
        scaler: Any = self._scaler
        if scaler is None or not scaler.is_enabled():
            self._step_wrapped(self.optimizer.step)
        elif not (found := scaler._found_inf_per_device(self)):  # nobody has called scaler.unscale_ on the wrapper
            self._step_wrapped(scaler.step, self.optimizer)
        elif not any(is_infinite.item() for is_infinite in found.values()):
            self._step_wrapped(self.optimizer.step)
        self._advance()

    def _end_loop(self) -> None:
        """After a loop over :meth:`passes`: leave the step to the caller."""
        self._pending = self._base_step

    def _step_on_gradients(self, was_under_way: bool) -> None:
        """A step without a closure: after :meth:`passes`, or in the hands of a trainer."""
        if was_under_way:
            raise RuntimeError(
                "step() was called before the passes of this step ended: .grad does not hold the combined gradient. "
                "Let the loop over optimizer.passes() run to its end, and call step() after it."
            )
        if self._pending is not None:
            upwards.check_scaler(self._scaler)
            pending, self._pending = self._pending, None
            pending()
        elif self._is_state_initialization():
            self._step_wrapped(self.optimizer.step)
        elif self._attachment is not None:
            self._attachment.check_consulted()
            self._step_wrapped(self.optimizer.step)  # whoever drives the loop has unscaled the gradients
            self._advance()
        else:
            raise RuntimeError(
                "step() was called without a closure: gradient regularization needs the loss at a second point. "
                "Pass a closure that clears the gradients, runs forward and backward and returns the loss, or run both in "
                "`for _ in optimizer.passes():` before step(), or let a Trainer drive the optimizer (optimizers=(optimizer, "
                "None), or gradreg_optim.attach(trainer) if the trainer creates it)."
            )
