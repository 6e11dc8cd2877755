"""The passes of one step, until the optimizer offers them itself."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from gradreg_optim.core.regularize import regularized
from gradreg_optim.core.step import Point


class _Unnoted:
    def noted(self, _point: Point) -> AbstractContextManager[None]:
        return nullcontext()


class Passes:
    """An iterator over the points of one step; notes the outcome at its end."""

    def __init__(self, optimizer: Any) -> None:
        self.storage = optimizer.storage()
        self.plan = optimizer.plan(self.storage)
        self.losses = _Unnoted()
        self._optimizer = optimizer
        self._points = regularized(self.storage, self.plan)

    def __iter__(self) -> Passes:
        return self

    def __next__(self) -> Point:
        try:
            return self._points.send(None)
        except StopIteration as end:
            if end.value is not None:
                self._optimizer.note(end.value)
            raise StopIteration from None

    def close(self) -> None:
        self._points.close()
