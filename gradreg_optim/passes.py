"""One regularized step in progress, whoever drives it: a closure, the caller's own ``for``, or a trainer."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, closing
from typing import Any

from gradreg_optim.core.plan import Plan
from gradreg_optim.core.regularize import regularized
from gradreg_optim.core.step import Outcome, Point
from gradreg_optim.core.storage import Storage
from gradreg_optim.core.witnesses import Losses


class Passes:
    """An iterator over the points at which the step wants a gradient, θ first; only θ in a step without penalty.

    Whoever iterates runs forward and backward at each point. ``surroundings(point)`` is what is around each pass. At the
    end the weights are at θ, the combined gradient is in its place, and ``end`` has been called with what came out. If the
    iteration is left early, by an exception, :meth:`close` or the end of the object, the weights are at θ, bit for bit,
    and g1 is back.
    """

    def __init__(
        self,
        plan: Plan,
        storage: Storage,
        losses: Losses,
        surroundings: Callable[[Point], AbstractContextManager[Any]],
        end: Callable[[Outcome], None],
    ) -> None:
        self.plan, self.storage, self.losses = plan, storage, losses
        self.is_done = False
        self._points = _points(plan, storage, losses, surroundings, end)

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
) -> Generator[Point, None, None]:
    with closing(regularized(storage, plan, losses)) as points:
        while True:
            try:
                point = next(points)
            except StopIteration as stop:
                outcome = stop.value
                break
            if plan.points:
                losses.begin_pass(is_first=point is Point.THETA)
            with surroundings(point):
                yield point
    end(outcome)
