"""One accumulation window of a DeepSpeed engine as a pass: the engine's step is held back while windows are repeated."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from gradreg_optim.core.step import Point
from gradreg_optim.zero.stage0 import WholeGradients
from gradreg_optim.zero.storage import Partitions


class HeldStep:
    """Holds back the engine's step; ``take()`` runs the one that was held back last."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.take: Callable[[], Any] = engine.step

    @contextmanager
    def held_back(self, *, counting: bool = True) -> Iterator[list[Callable[[], Any]]]:
        """Inside the block ``engine.step`` at the end of a window only adds itself to the yielded list.

        Before the end of a window ``engine.step`` runs as usual, or only advances ``micro_steps`` if not ``counting``.
        """
        engine, step = self._engine, self._engine.step
        held: list[Callable[[], Any]] = []

        @functools.wraps(step)
        def held_step(*args: Any, **kwargs: Any) -> None:
            if engine.is_gradient_accumulation_boundary():
                held.append(functools.partial(step, *args, **kwargs))
            elif counting:
                step(*args, **kwargs)
            else:
                engine.micro_steps += 1

        engine.step = held_step
        try:
            yield held
        finally:
            del engine.step
        if held:
            self.take = held[0]

    @contextmanager
    def repeated(self, first_micro_step: int | None = None) -> Iterator[None]:
        """Inside the block the engine counts from ``first_micro_step``; its counters and timer are restored afterwards."""
        engine, timer = self._engine, vars(self._engine.tput_timer)
        before, end = dict(timer), engine.micro_steps
        engine.micro_steps = end if first_micro_step is None else first_micro_step
        try:
            with self.held_back(counting=False):
                yield
        finally:
            engine.micro_steps = end
            timer.update(before)
            if not engine.is_gradient_accumulation_boundary():  # set by hand, in a block that raised before its end
                engine.set_gradient_accumulation_boundary(True)


def accumulation_windows(
    storage: Partitions | WholeGradients, held_step: HeldStep, same_start: Callable[[Point], AbstractContextManager[None]]
) -> Callable[[Point], AbstractContextManager[None]]:
    """The context of each pass of one step: all passes start from the engine's counters as they are now."""
    engine, first_micro_step = storage.engine, storage.engine.micro_steps

    @contextmanager
    def window(point: Point) -> Iterator[None]:
        boundary = engine._is_gradient_accumulation_boundary
        storage.sums_announced = 0
        try:
            with same_start(point):
                if point is Point.THETA:
                    with held_step.held_back() as held:
                        yield
                    _require_end(engine, len(held), storage.sums_announced)
                    engine.micro_steps += len(held) - 1  # for the steps that were held back and will not run
                else:
                    with held_step.repeated(first_micro_step):
                        yield
        finally:
            if engine._is_gradient_accumulation_boundary is not boundary:  # ``announce`` has set it
                engine.set_gradient_accumulation_boundary(boundary)

    return window


def _require_end(engine: Any, ended: int, announced: int) -> None:
    """Raise unless a closure has run one window to its end, or ``MicroBatches`` each one that was announced."""
    if announced and ended != announced:
        raise RuntimeError(
            "MicroBatches: backward(batch) did not call engine.step(). Under DeepSpeed it must run engine(...), "
            "engine.backward(loss) and engine.step(); the wrapper holds the step back at the end of a window."
        )
    if not announced and ended != 1:
        raise RuntimeError(
            f"The closure ran {ended} accumulation windows to their end, but a step needs exactly one. "
            f"Run engine(...), engine.backward(loss) and engine.step() on {engine.gradient_accumulation_steps()} "
            "micro-batches (gradient_accumulation_steps)."
        )
