"""What a closure is under DeepSpeed: its inner loop over one accumulation window, which ends in an ``engine.step()``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradreg_optim.zero.optimizer import ZeroGradRegOptimizer

__all__ = ["AccumulationWindow"]


class AccumulationWindow:
    """A closure over one accumulation window, callable a second time: the engine's step at its end is held back.

    Every call starts from the engine's counters as they were, and leaves them as the first call did.
    """

    def __init__(self, optimizer: ZeroGradRegOptimizer, closure: Callable[[], Any]) -> None:
        self._optimizer = optimizer
        self._closure = closure
        self._first_micro_step = optimizer._engine.micro_steps
        self._ran = False

    def __call__(self) -> Any:
        """Run the window, the first time or again; what the closure returns."""
        if self._ran:
            with self._optimizer.second_window(self._first_micro_step):
                return self._closure()
        engine = self._optimizer._engine
        with self._optimizer.held_back() as held:
            loss = self._closure()
        if len(held) != 1:
            raise RuntimeError(
                f"The closure ran {len(held)} accumulation windows to their end, and one is regularized at a time. "
                f"Let it run engine(...), engine.backward(loss) and engine.step() on "
                f"{engine.gradient_accumulation_steps()} micro-batches (gradient_accumulation_steps)."
            )
        self._ran = True
        return loss
