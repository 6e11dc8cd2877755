"""A pass under DeepSpeed: its inner loop over one accumulation window, which ends in an ``engine.step()``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from gradreg_optim.core.step import Point
from gradreg_optim.zero.storage import Partitions


class HeldStep:
    """Holds an engine's step back while windows are run and repeated; ``take`` is the step that was held back last."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.take: Callable[[], Any] = engine.step

    @contextmanager
    def held_back(self, *, counting: bool = True) -> Iterator[list[Callable[[], Any]]]:
        """Inside the block the engine's step at the end of a window does nothing but note itself in the yielded list.

        Other calls of ``engine.step`` are as ever, or, if not ``counting``, only advance to the next micro-batch.
        """
        engine, step = self._engine, self._engine.step
        held: list[Callable[[], Any]] = []

        @functools.wraps(step)
        def noted(*args: Any, **kwargs: Any) -> None:
            if engine.is_gradient_accumulation_boundary():
                held.append(functools.partial(step, *args, **kwargs))
            elif counting:
                step(*args, **kwargs)
            else:
                engine.micro_steps += 1

        engine.step = noted
        try:
            yield held
        finally:
            del engine.step
        if held:
            self.take = held[0]

    @contextmanager
    def repeated(self, first_micro_step: int | None = None) -> Iterator[None]:
        """Run the micro-batches of a window again: the engine counts from ``first_micro_step``, and then as before."""
        engine, timer = self._engine, vars(self._engine.tput_timer)
        before, end = dict(timer), engine.micro_steps
        engine.micro_steps = end if first_micro_step is None else first_micro_step
        try:
            with self.held_back(counting=False):
                yield
        finally:
            engine.micro_steps = end
            timer.update(before)
            if not engine.is_gradient_accumulation_boundary():  # set by hand, and the block did not get to the end
                engine.set_gradient_accumulation_boundary(True)


class AccumulationWindow:
    """Around each pass of one step: all start from the engine's counters as they were before the first."""

    def __init__(
        self, storage: Partitions, held_step: HeldStep, same_start: Callable[[Point], AbstractContextManager[None]]
    ) -> None:
        self._storage = storage
        self._held_step = held_step
        self._same_start = same_start
        self._first_micro_step = storage.engine.micro_steps

    @contextmanager
    def __call__(self, point: Point) -> Iterator[None]:
        """Run the block, which is the pass at ``point``."""
        engine = self._storage.engine
        boundary = engine._is_gradient_accumulation_boundary
        self._storage.sums_announced = 0
        try:
            with self._same_start(point):
                if point is Point.THETA:
                    with self._held_step.held_back() as held:
                        yield
                    self._require_end(len(held))
                else:
                    with self._held_step.repeated(self._first_micro_step):
                        yield
        finally:
            if engine._is_gradient_accumulation_boundary is not boundary:  # set for micro-batches
                engine.set_gradient_accumulation_boundary(boundary)

    def _require_end(self, ended: int) -> None:
        engine, announced = self._storage.engine, self._storage.sums_announced
        if announced and ended != announced:
            raise RuntimeError(
                "MicroBatches under DeepSpeed: backward(batch) did not take the engine's step. "
                "Let it run engine(...), engine.backward(loss) and engine.step(); at the end of a window it is held back."
            )
        if not announced and ended != 1:
            raise RuntimeError(
                f"The closure ran {ended} accumulation windows to their end, and one is regularized at a time. "
                f"Let it run engine(...), engine.backward(loss) and engine.step() on "
                f"{engine.gradient_accumulation_steps()} micro-batches (gradient_accumulation_steps)."
            )
        engine.micro_steps += ended - 1  # steps that were held back and will not be made up for
