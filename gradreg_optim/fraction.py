"""``fraction=f``: the difference on some of a step's micro-batches, at the cost of 1 + f gradients instead of two.

Of n micro-batches, whose gradients sum up to g1, m = round(f·n) are the *part* S. The direction is the whole g1, and

    ĝ2 = g1 + (n/m)·(g2_S − g1_S)        g = g1 + (γ/ε)·(ĝ2 − g1)

takes the place of g2. Nothing but the part runs a second time. g1_S costs no pass: it is what the first pass has added up
over the part, so g1 is accumulated in two sums. S is a run of neighbours, the first of which follows the last, and starts
at a place drawn anew in each step from its number: every micro-batch is in it with probability m/n, so E[ĝ2] = g2 over the
choice, and all ranks choose alike. Its price is variance: the difference is as noisy as that of a batch of a fraction f, and
longer than the whole one by its noise.

Memory: one more gradient, g1_S. Communication: with DistributedDataParallel and ZeRO stage 1, gradients are reduced once or
twice more in the first pass, where the part begins and where it ends; FSDP2 likewise if it accumulates without reducing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from gradreg_optim.checks import Gradients
from gradreg_optim.finite_difference import scale_, shift_
from gradreg_optim.gradients import FirstGradient, Part, owned
from gradreg_optim.perturbation import RandomState
from gradreg_optim.phases import RegularizedStep

__all__ = ["MicroBatches", "PartialDifference", "SplitGradient", "chosen_part"]

Sum = Any
"""Gradients on the way to a sum: by parameter, or whatever an engine keeps."""


class MicroBatches:
    """A closure in pieces: what a step runs on each of its micro-batches. For ``fraction=``; any other step takes it too.

    Args:
        backward: forward and backward of one micro-batch, called with gradients enabled; returns the loss. The losses of
            all micro-batches add up to the loss of the step, so a mean is divided by their number. It clears no
            gradients: the optimizer does. Under DeepSpeed it is the usual ``engine(...)``, ``engine.backward(loss)``,
            ``engine.step()``.
        batches: the micro-batches, each of which is given to ``backward`` as it is.
        no_sync: called for a context in which gradients are not reduced over ranks, around each micro-batch after which
            they need not be: ``model.no_sync`` of DistributedDataParallel. Without it they are reduced every time.

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

    def run(self, position: int, *, reduced: bool) -> Any:
        """Forward and backward of one micro-batch; ``reduced`` if its gradient has to be complete over ranks afterwards."""
        with nullcontext() if reduced else self.no_sync():
            return self.backward(self.batches[position])


def chosen_part(count: int, fraction: float, step: int) -> frozenset[int]:
    """The positions of round(fraction·count) of ``count`` micro-batches, at least one, drawn for ``step``.

    >>> sorted(chosen_part(8, 0.25, step=0)), sorted(chosen_part(8, 0.25, step=1))
    ([6, 7], [2, 3])
    """
    size = max(1, round(fraction * count))
    start = random.Random(step).randrange(count)
    return frozenset((start + offset) % count for offset in range(size))


class SplitGradient:
    """The first pass of one step, whose gradient is accumulated in two sums: the part's, and that of the others."""

    def __init__(self, optimizer: PartialDifference, count: int) -> None:
        self._optimizer = optimizer
        self._count = count
        fraction = float(optimizer.param_groups[0]["gradreg_fraction"])
        self.part = chosen_part(count, fraction, optimizer.step_count)
        self._sums: dict[bool, Sum] = {}

    @property
    def is_whole(self) -> bool:
        """Whether the part is everything, and there is nothing to split."""
        return len(self.part) == self._count

    def ends_after(self, position: int) -> bool:
        """Whether a stretch of the part, or of the others, ends with that micro-batch: its gradient has to be complete."""
        following = position + 1
        return following == self._count or (position in self.part) != (following in self.part)

    def close(self, position: int) -> None:
        """Put the gradients away that have been accumulated up to that micro-batch; the last stretch's stay in place."""
        if position + 1 == self._count or not self.ends_after(position):
            return
        stretch, kind = self._optimizer._take_stretch(), position in self.part
        self._sums[kind] = self._optimizer._added(self._sums[kind], stretch) if kind in self._sums else stretch

    def joined(self) -> Part | None:
        """Complete g1 in its place; g1_S, unless the part is everything."""
        if self.is_whole:
            return None
        last = self._count - 1 in self.part
        if last in self._sums:
            self._optimizer._add_stretch(self._sums.pop(last))
        gradients = self._optimizer._copy_stretch() if last else self._sums[True]
        self._optimizer._add_stretch(self._sums.pop(not last))
        return Part(self._count / len(self.part), gradients)


class PartialDifference(RegularizedStep):
    """A step on micro-batches, of which some make the difference."""

    def _step_in_parts(self, micro_batches: MicroBatches) -> Any:
        """One step; the sum of the losses at θ."""
        count = len(micro_batches.batches)
        if not self.regularizes:
            return self._plain_step(lambda: self._first_window(micro_batches, lambda position: position + 1 == count))
        split = SplitGradient(self, count)
        starts: dict[int, RandomState] = {}

        def before(position: int) -> None:
            if position in split.part and (position == 0 or position - 1 not in split.part):
                starts[position] = RandomState(self._devices())

        loss = self._first_window(micro_batches, split.ends_after, before, split.close)
        part, last = split.joined(), max(split.part)

        def second_pass() -> None:
            self._clear_gradients()
            for position in sorted(split.part):
                if position in starts:
                    starts[position].restore()
                self._run(micro_batches, position, reduced=position == last)

        self.regularize_(RandomState(self._devices()).replayed()(self._window_again(second_pass)), part)
        self._base_step()
        return loss

    def _first_window(
        self,
        micro_batches: MicroBatches,
        reduced: Callable[[int], bool],
        before: Callable[[int], None] = lambda _: None,
        after: Callable[[int], None] = lambda _: None,
    ) -> Any:
        """Run all micro-batches at θ; the sum of their losses."""
        self._clear_gradients()
        losses = []
        for position in range(len(micro_batches.batches)):
            before(position)
            losses.append(self._run(micro_batches, position, reduced=reduced(position)))
            after(position)
        losses = [loss.detach() if isinstance(loss, Tensor) else loss for loss in losses]
        return None if any(loss is None for loss in losses) else sum(losses[1:], losses[0])

    def _run(self, micro_batches: MicroBatches, position: int, *, reduced: bool) -> Any:
        return micro_batches.run(position, reduced=reduced)

    def _window_again(self, second_pass: Callable[[], None]) -> Callable[[], None]:
        """``second_pass``, in the frame in which the engine runs it."""
        return second_pass

    def _completed(self, first: FirstGradient, gradients: Gradients) -> None:
        """Write ĝ2 over g2_S, or its like for another point."""
        part = first.part
        if part is None:
            return
        exact = self.param_groups[0]["gradreg_method"] == "exact"
        starts = None if exact else self._aligned(first, part.gradients)
        for number, (share, written) in enumerate(zip(first.shares, gradients, strict=True)):
            if starts is not None and written:
                torch._foreach_sub_(written, starts[number])
            scale_(written, part.factor)
            if starts is not None:
                shift_(written, share.g1, eps=1.0 / first.clip)

    # Stretches of micro-batches, by parameter.

    def _clear_gradients(self) -> None:
        self.zero_grad()

    def _take_stretch(self) -> Sum:
        """The gradients in ``.grad``, which is cleared."""
        taken = {}
        for parameter in self._parameters():
            if parameter.grad is not None:
                taken[id(parameter)] = owned(parameter.grad)
            parameter.grad = None
        return taken

    def _copy_stretch(self) -> Sum:
        """Copies of the gradients in ``.grad``."""
        return {id(p): p.grad.clone() for p in self._parameters() if p.grad is not None}

    def _add_stretch(self, stretch: Sum) -> None:
        """Add to the gradients in ``.grad``."""
        for parameter in self._parameters():
            if id(parameter) in stretch:
                addend = stretch[id(parameter)]
                parameter.grad = addend.clone() if parameter.grad is None else parameter.grad.add_(addend)

    def _added(self, total: Sum, stretch: Sum) -> Sum:
        """The sum of two stretches, in the place of the first."""
        for key, gradient in stretch.items():
            total[key] = total[key].add_(gradient) if key in total else gradient
        return total
