"""One regularized step in progress, whoever drives it: a closure, the caller's own ``for``, or a trainer."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradreg_optim.core.plan import Plan
from gradreg_optim.core.regularize import regularized
from gradreg_optim.core.replicas import Part
from gradreg_optim.core.step import Figure, Outcome, Point, Scalar
from gradreg_optim.core.storage import Storage
from gradreg_optim.core.strength import with_others
from gradreg_optim.core.witnesses import Losses


@dataclass
class Progress:
    """What steps leave for later calls; one object, which Lightning's copy of the optimizer shares.

    ``passes`` is the loop over :meth:`~gradreg_optim.GradRegOptimizer.passes` that began last;
    ``is_complete``: it was the last one of its step, and a ``step()`` is to follow. ``outcomes`` are those of
    the step's micro-batches so far, of ``micro_batches``, and ``marks`` those of gradients that they left.
    ``is_checked``: the first one is that of a check; ``is_proven``: a step has shown that θ comes back.
    """

    figures: dict[str, Figure] = field(default_factory=dict)
    skipped: Scalar = 0
    passes: weakref.ref[Passes] | None = None
    is_complete: bool = False
    outcomes: list[Outcome] = field(default_factory=list)
    marks: list[tuple[int, int]] = field(default_factory=list)
    micro_batches: int = 1
    is_checked: bool = False
    is_proven: bool = False

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no loop under way."""
        return {**self.__dict__, "passes": None, "outcomes": []}

    @property
    def is_under_way(self) -> bool:
        """Whether the loop that began last stands at a point."""
        passes = None if self.passes is None else self.passes()
        return passes is not None and not passes.is_done

    def abandon(self) -> bool:
        """Bring the weights back if a loop stands at a point; whether one did."""
        return self.is_under_way and self.passes().close()  # type: ignore[misc, union-attr]


class Passes:
    """Iterates over the points at which a step needs a gradient, θ first; only θ in a step without penalty.

    Whoever iterates runs forward and backward at each point. ``surroundings(point)`` is what is around each
    pass. At the end the weights are at θ, the combined gradient is in its place, and ``end`` has been called
    with what came out. If the iteration is left early, by an exception, :meth:`close` or the end of the
    object, the weights are at θ, bit for bit, and g1 is back.
    """

    def __init__(
        self,
        plan: Plan,
        storage: Storage,
        losses: Losses,
        surroundings: Callable[[Point], AbstractContextManager[Any]],
        end: Callable[[Outcome], None],
        part: Part,
    ) -> None:
        self.plan, self.storage, self.losses = plan, storage, losses
        self.is_done = False
        self._points = _points(plan, storage, losses, surroundings, end, part)

    def __iter__(self) -> Passes:
        """The passes themselves."""
        return self

    def __next__(self) -> Point:
        """The next point."""
        try:
            return next(self._points)
        except BaseException:
            self.is_done = True
            raise

    def close(self) -> bool:
        """Abandon the step; whether it was under way."""
        was_done, self.is_done = self.is_done, True
        self._points.close()
        return not was_done


def _points(
    plan: Plan,
    storage: Storage,
    losses: Losses,
    surroundings: Callable[[Point], AbstractContextManager[Any]],
    end: Callable[[Outcome], None],
    part: Part,
) -> Generator[Point, None, None]:
    outcome = Outcome({})
    with (
        storage.apart() if part.number else nullcontext(),
        closing(regularized(storage, plan, losses)) as points,
    ):
        while True:
            try:
                point = next(points)
            except StopIteration as stop:
                outcome = stop.value
                break
            if point is Point.THETA:
                losses.passes.clear()
            losses.passes.append([])
            with part.replicas.unreduced() if part.is_apart else nullcontext(), surroundings(point):
                yield point
        if plan.settling is not None and outcome.settling is None:
            outcome.settling = with_others(plan.settling, storage, torch.zeros(2))  # this rank has none
    end(outcome)


def call_in_each(
    closure: Callable[[], Any], passes: Passes, calling_scaler: Callable[[], Any]
) -> tuple[Any, bool]:
    """Call ``closure`` in each pass; returns the loss at θ, and whether all passes ran.

    Composer's scaler hands over a closure that unscales, and returns ``None`` after an overflow on any rank:
    then no further pass is run. Elsewhere a closure that returns no loss means nothing.
    """
    call, losses, noted = torch.enable_grad()(closure), list[Any](), passes.losses
    for _ in passes:
        losses.append(call())
        if passes.plan.points and not noted.passes[-1] and isinstance(losses[-1], (float, Tensor)):
            noted.note(torch.as_tensor(losses[-1]), None)  # a closure that calls no ``backward``
        if losses[-1] is None and calling_scaler() is not None:
            return None, False
    return losses[0], True


def marks_of_gradients(groups: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """What tells whether somebody has replaced or written gradients."""
    parameters = (parameter for group in groups for parameter in group["params"])
    return [(id(p.grad), p.grad._version) for p in parameters if p.grad is not None]


def require_idle(closure: Callable[[], Any], groups: list[dict[str, Any]]) -> None:
    """Call a closure that comes after a loop over passes; raise if it touches the gradients of ``groups``."""
    before = marks_of_gradients(groups)
    torch.enable_grad()(closure)()
    if marks_of_gradients(groups) != before:
        raise RuntimeError(
            "step(closure) after a loop over passes(): the closure changed the combined gradient. Run "
            "forward and backward in one of the two: in `for _ in optimizer.passes():` followed by "
            "step(), or in step(closure)."
        )
