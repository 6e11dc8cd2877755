"""``fraction=f``: the difference on some of a step's micro-batches, at the cost of 1 + f gradients instead of two.

The gradients of n micro-batches sum up to g1. The step repeats m = round(f·n) of them, the part S, and uses

    ĝ2 = g1 + (n/m)·(g2_S − g1_S)        g = g1 + (γ/ε)·(ĝ2 − g1)

in place of g2. The direction of the step is the whole g1. g1_S needs no pass of its own: the first pass accumulates g1 in
two sums. S is a contiguous block of micro-batches, wrapping around at the end. Its start is drawn from a generator seeded
with the step number, so all ranks choose the same block. Every micro-batch is in S with probability m/n, so ĝ2 is unbiased.
The price is variance: the difference is as noisy as that of a batch of a fraction f.

Memory: one more gradient, g1_S. Communication: DistributedDataParallel, ZeRO stage 1, and FSDP2 without reduction during
accumulation, reduce gradients once or twice more in the first pass, where S begins and where it ends.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from gradreg_optim.core.plan import Plan
from gradreg_optim.core.repeatable import Buffers, RandomState
from gradreg_optim.core.step import PartOfPass, Point
from gradreg_optim.core.storage import Storage


class MicroBatches:
    """A step's micro-batches, passed to ``step`` in place of a closure. ``fraction`` needs it.

    Args:
        backward: runs forward and backward of one micro-batch with gradients enabled and returns the loss. The losses of all
            micro-batches add up to the loss of the step: divide a mean by their number. The optimizer clears gradients.
            Under DeepSpeed: ``engine(...)``, ``engine.backward(loss)``, ``engine.step()``.
        batches: the micro-batches; ``backward`` gets each of them.
        no_sync: returns a context in which gradients are not reduced over ranks, such as ``model.no_sync`` of
            DistributedDataParallel. Without it every micro-batch reduces its gradients.

    Raises:
        ValueError: there are no micro-batches.

    >>> w = torch.nn.Parameter(torch.tensor([1.0]))
    >>> from gradreg_optim import GradRegOptimizer
    >>> optimizer = GradRegOptimizer(torch.optim.SGD([w], lr=0.1), strength=0.5, eps=0.25, fraction=0.25)
    >>> def backward(x):
    ...     loss = 2 * (w * x).square().sum() / 4    # gradients of w and Hessians of 1, four times
    ...     loss.backward()
    ...     return loss.detach()
    >>> optimizer.step(MicroBatches(backward, [1.0] * 4))
    tensor(2.)
    >>> w.item()                                     # 1 − 0.1·(4 + 0.5·4·4), with the difference of one of the four
    -0.2000...
    """

    def __init__(
        self,
        backward: Callable[[Any], Any],
        batches: Iterable[Any],
        *,
        no_sync: Callable[[], AbstractContextManager[Any]] | None = None,
    ) -> None:
        self.backward = torch.enable_grad()(backward)
        self.batches: Sequence[Any] = list(batches)
        self.no_sync = no_sync or nullcontext
        if not self.batches:
            raise ValueError("batches=[]: a step needs at least one micro-batch. Skip the step, or give it data.")

    def drive(self, points: Generator[Point, PartOfPass | None, Any], storage: Storage, plan: Plan, buffers: Buffers) -> Any:
        """Run what each of ``points`` wants: all micro-batches at θ, and those of the part at further points.

        Returns:
            The sum of the losses at θ, ``None`` if one of them is.
        """
        count = len(self.batches)
        split = SplitGradient(storage, plan, count)
        starts: dict[int, tuple[Callable[[], None], ...]] = {}  # restore random numbers and buffers of a block of the part

        losses = []
        next(points)
        storage.begin_window(count)
        for position in range(count):
            if position in split.part and (position == 0 or position - 1 not in split.part):
                starts[position] = RandomState(storage.devices).restore, buffers.mark()
            losses.append(self._run(storage, position, is_summed=split.ends_after(position)))
            split.close(position)

        def repeat() -> None:
            for position in sorted(split.part):
                for restore in starts.get(position, ()):
                    restore()
                self._run(storage, position, is_summed=position == max(split.part))

        further_passes(points, split.joined(), repeat)
        losses = [loss.detach() if isinstance(loss, Tensor) else loss for loss in losses]
        return None if any(loss is None for loss in losses) else sum(losses[1:], losses[0])

    def _run(self, storage: Storage, position: int, *, is_summed: bool) -> Any:
        """Forward and backward of one micro-batch; ``is_summed``: its gradient has to be complete over ranks afterwards."""
        storage.announce(is_summed=is_summed)
        with nullcontext() if is_summed else self.no_sync():
            return self.backward(self.batches[position])


def further_passes(points: Generator[Point, PartOfPass | None, Any], part: PartOfPass | None, run: Callable[[], Any]) -> Any:
    """After a first pass call ``run``, which repeats all of it or ``part``, at each further one of ``points``.

    Returns what ``points`` return.
    """
    while True:
        try:
            points.send(part)
        except StopIteration as end:
            return end.value
        part = None  # ``.grad`` is empty now: the storage has taken all gradients
        run()


def chosen_part(count: int, fraction: float, step: int) -> frozenset[int]:
    """The positions of round(fraction·count) of ``count`` micro-batches, at least one, drawn for ``step``.

    >>> sorted(chosen_part(8, 0.25, step=0)), sorted(chosen_part(8, 0.25, step=1))
    ([6, 7], [2, 3])
    """
    size = max(1, round(fraction * count))
    start = random.Random(step).randrange(count)
    return frozenset((start + offset) % count for offset in range(size))


class SplitGradient:
    """Accumulates the first pass in two sums, that of the part and that of the others.

    Without penalty, or with ``fraction=1``, the part is everything.
    """

    def __init__(self, storage: Storage, plan: Plan, count: int) -> None:
        self._storage = storage
        self._count = count
        is_split = plan.regularizes and plan.fraction < 1
        self.part = chosen_part(count, plan.fraction, plan.step) if is_split else frozenset(range(count))
        self._sums: dict[bool, Any] = {}

    def ends_after(self, position: int) -> bool:
        """Whether a block of the part, or of the others, ends with that micro-batch: its gradient has to be complete."""
        following = position + 1
        return following == self._count or (position in self.part) != (following in self.part)

    def close(self, position: int) -> None:
        """Take the gradients that were accumulated up to that micro-batch; those of the last block stay in place."""
        if position + 1 == self._count or not self.ends_after(position):
            return
        kind = position in self.part
        if kind in self._sums:
            self._storage.add_sum(self._sums.pop(kind))
        self._sums[kind] = self._storage.take_sum()

    def joined(self) -> PartOfPass | None:
        """Complete g1 in its place; return g1_S, or ``None`` if the part is everything."""
        if len(self.part) == self._count:
            return None
        last = self._count - 1 in self.part
        if last in self._sums:
            self._storage.add_sum(self._sums.pop(last))
        gradients = self._storage.copy_sum() if last else self._sums[True]
        self._storage.add_sum(self._sums.pop(not last))
        return PartOfPass(self.part, self._count, gradients)
