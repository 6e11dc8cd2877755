"""Are the passes of a step passes of one function, and in which precision? Their losses tell.

    L(θ + ε·d) − L(θ) = ε·⟨g1 + g2, d⟩/2 + O(ε³)

A loss that draws another batch or other masks at each call changes by more, and (g2 − g1)/ε is then the difference of two
batches, divided by ε. A change that is far off is no proof, since curvature may change within the step. So the last pass is
repeated where it was: now the loss has to be the same number.

The graph of a loss tells the dtype of each result on the way to it, whether weights, autocast or a cast chose it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from gradreg_optim.core.finite_difference import stack_scalars
from gradreg_optim.core.local import local_shard, real
from gradreg_optim.core.multi_tensor import moments_along
from gradreg_optim.core.plan import Plan
from gradreg_optim.core.step import FirstGradient, PartOfPass, Point
from gradreg_optim.core.storage import Storage

NODES = 10_000
"""Nodes of a graph that are looked at, from the loss backwards."""


@contextmanager
def backward_replaced(stand_in: Callable[..., None]) -> Iterator[None]:
    """In the block each backward is ``stand_in(backward, …)``, but for those that it runs: reentrant checkpoints do."""
    backward = torch.autograd.backward

    def replaced(*args: Any, **kwargs: Any) -> None:
        torch.autograd.backward = backward
        try:
            stand_in(backward, *args, **kwargs)
        finally:
            torch.autograd.backward = replaced

    torch.autograd.backward = replaced
    try:
        yield
    finally:
        torch.autograd.backward = backward


class Losses:
    """Notes what passes differentiate: the arguments of ``backward``, or what a closure returns that does not call it.

    Used in the first step with further passes, until one was in order (``is_due``), and in the steps of a check: reading
    them waits for the device.
    Communication there: all_reduces of two numbers, over the ranks that share the gradient.
    """

    def __init__(self) -> None:
        self._modules: Iterable[nn.Module] = ()
        self.is_due = True
        self.low_dtype: torch.dtype | None = None  # in which passes compute, if it has fewer bits than float32
        self._seen: torch.dtype | None = None  # the same, of this rank's losses
        self._passes: list[list[Tensor]] = []

    def __reduce__(self) -> Any:
        """A copy of the optimizer has losses of its own."""
        return Losses, ()

    def begun(self, modules: Iterable[nn.Module]) -> Losses:
        """Forget the last step; ``modules`` is the collection of those that will have run in this one."""
        self._passes, self._modules = [], modules
        return self

    def noted(self) -> AbstractContextManager[None]:
        """Around one pass."""
        losses: list[Tensor] = []
        self._passes.append(losses)

        def note(backward: Callable[..., None], tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> None:
            tensors, grad_tensors = _as_tuple(tensors), _as_tuple(grad_tensors)
            losses.append(_differentiated(tensors, grad_tensors))
            self._seen = self._seen or low_dtype_behind((tensors,) if isinstance(tensors, Tensor) else tensors)
            backward(tensors, grad_tensors, *args, **kwargs)

        return backward_replaced(note)

    def returned(self, loss: Any) -> Any:
        """Note what a closure returned, if it called no ``backward``; return it."""
        if self._passes and not self._passes[-1] and isinstance(loss, (float, Tensor)):
            self._passes[-1].append(_differentiated((torch.as_tensor(loss),), None))
        return loss

    def are_low(self, storage: Storage) -> bool:
        """Whether the first pass computed in half precision on any rank."""
        share, low = self._means(storage, float(self._seen is not None))[0], self._seen
        if low is not None or share > 0:
            self.low_dtype = low or torch.bfloat16  # on another rank
        return self.low_dtype is not None

    def are_far(self, storage: Storage, first: FirstGradient, plan: Plan, part: PartOfPass | None) -> bool:
        """Whether the change of the loss between θ and the last point is far from what the gradients tell."""
        start, end = self._passes[0], self._passes[-1]
        if part is not None:  # as many of them belong to each micro-batch
            start = [loss for number, loss in enumerate(start) if number * part.count // len(start) in part.positions]
        sizes = (abs(_sum(start)) + abs(_sum(end))) / storage.loss_scale
        change, size = self._means(storage, (_sum(end) - _sum(start)) / storage.loss_scale, sizes)
        if not math.isfinite(change):
            return False
        self.is_due = False
        if plan.points[-1] is Point.TWICE:  # at θ itself, through other kernels
            return abs(change) > _tolerance(start) * size
        steps = [float(group.eps) * float(first.clip) for group in first.groups]
        slope = sum(step * float(g.g1_squared) / float(first.clip) ** 2 for step, g in zip(steps, first.groups, strict=True))
        slope /= 1 if part is None else part.factor
        slack = abs(slope) + 4 * _spacing(start) * size
        if abs(change - slope) <= abs(slope) + slack:
            return False
        second = storage.laid_out(first, storage.copy_sum())
        pairs = [(group.counted(g2), group.counted(group.g1)) for group, g2 in zip(first.groups, second, strict=True)]
        inner = storage.sum_over_ranks(stack_scalars([moments_along(*pair)[0] for pair in pairs])) / storage.loss_scale**2
        expected = (slope + sum(step * value for step, value in zip(steps, inner.tolist(), strict=True))) / 2
        return bool(abs(change - expected) > abs(expected) + slack)

    def require_same(self, storage: Storage) -> None:
        """Raise on every rank if on one the loss of the last pass is not that of the one before, at the same point."""
        loss, again = _sum(self._passes[-2]), _sum(self._passes[-1])
        tolerance = _tolerance(self._passes[-1])
        is_same = math.isclose(loss, again, rel_tol=tolerance, abs_tol=tolerance * storage.loss_scale / 100)
        is_same = is_same or (math.isnan(loss) and math.isnan(again))
        if self._means(storage, float(not is_same))[0]:
            self.is_due = True
            raise RuntimeError(
                f"The loss is not a function of the weights: it was {loss!r} in the second pass and {again!r} when that was "
                "repeated at the same weights, from the same random numbers and buffers"
                f"{' (the losses differ on another rank)' if is_same else ''}. The difference of the two gradients would "
                "measure this change. Draw the batch before the closure, or before the loop over passes(), and masks from "
                "torch's global generators, or seed your own generator in each call."
            )

    def _means(self, storage: Storage, *values: float) -> list[float]:
        """The means of ``values`` over the ranks that share the gradient; NaN if it is not known which do."""
        sums = storage.sum_over_ranks(torch.tensor([*values, 1.0], dtype=torch.float64))
        models = (module for module in self._modules if isinstance(module, DistributedDataParallel))
        replicas = [*((model.process_group, model.device) for model in models), *getattr(storage, "replicas", ())]
        for group, device in {id(group): (group, device) for group, device in replicas}.values():
            sums = sums.to(device)
            distributed.all_reduce(sums, group=group)
        *totals, count = sums.tolist()
        is_parallel = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
        return [math.nan if is_parallel and count == 1 else total / count for total in totals]


class Clearing:
    """Notices a first pass that adds to gradients from before instead of clearing them, until it has seen one clear.

    Such a pass (of Lightning, with ``accumulate_grad_batches``) covers all of a step's micro-batches, and the second one
    only its own. When the first backward that reaches it begins, one gradient must have gone or been written; only one that
    was not is read, since zeros need no clearing.
    """

    def __init__(self) -> None:
        self.is_seen = False

    @contextmanager
    def required(self, parameters: Iterable[Tensor]) -> Iterator[None]:
        """Run the block, which is a first pass; raise if it did not clear gradients."""
        with_gradient = (p for p in parameters if p.requires_grad and p.grad is not None)
        candidates = [p for p in with_gradient if p.grad.layout is torch.strided]  # type: ignore[union-attr]
        if not candidates:
            yield
            return
        parameter = min(candidates, key=Tensor.numel)
        gradient: Any = parameter.grad
        held, was_cleared = real(gradient), list[bool]()
        version, start = held._version, held if type(gradient) is Tensor else held.clone()

        def is_as_before() -> bool:
            if type(gradient) is Tensor:
                return held._version == version and parameter.grad is gradient
            return parameter.grad is not None and torch.equal(real(parameter.grad), start)  # DTensors have no version

        def compare(backward: Callable[..., None], *args: Any, **kwargs: Any) -> None:
            before = held.clone() if not was_cleared and is_as_before() else None
            backward(*args, **kwargs)
            if not was_cleared and (before is None or not is_as_before()):  # else it was the backward of something else
                was_cleared.append(before is None or not bool(before.any()))

        with backward_replaced(compare):
            yield
        if was_cleared and not was_cleared[0]:
            raise RuntimeError(
                "The closure added to gradients from before it was called: its second call would lack them. Clear gradients "
                "in the closure and run all micro-batches of the step in it (in Lightning, by manual optimization instead "
                "of accumulate_grad_batches)."
            )
        self.is_seen = bool(was_cleared)


def low_dtype_behind(roots: Iterable[Any]) -> torch.dtype | None:
    """A dtype with fewer bits than float32 among the results from which ``roots`` were computed; ``None`` if there is none.

    >>> x = torch.ones(2, requires_grad=True)
    >>> low_dtype_behind([x.sum()]), low_dtype_behind([x.bfloat16().float().sum()])
    (None, torch.bfloat16)
    """
    todo = deque(root.grad_fn if isinstance(root, Tensor) else getattr(root, "node", None) for root in roots)
    seen = set[Any]()
    while todo and len(seen) < NODES:
        node = todo.popleft()
        if node is None or node in seen:
            continue
        seen.add(node)
        for result in getattr(node, "_input_metadata", ()):  # private: what forward put out is what backward takes in
            if result.dtype.is_floating_point and result.dtype.itemsize < torch.float32.itemsize:
                return result.dtype  # type: ignore[no-any-return]
        todo.extend(following for following, _ in node.next_functions)
    return None


def _as_tuple(tensors: Any) -> Any:
    return tensors if tensors is None or isinstance(tensors, Tensor) else tuple(tensors)


def _differentiated(tensors: Any, grad_tensors: Any) -> Tensor:
    """The number whose gradient ``backward`` computes with these arguments; NaN if they are graph edges."""
    roots = (tensors,) if isinstance(tensors, Tensor) else tensors
    factors = (grad_tensors,) if isinstance(grad_tensors, Tensor) else grad_tensors or [None] * len(roots)
    products = []
    with torch.no_grad():
        for root, factor in zip(roots, factors, strict=False):
            if not isinstance(root, Tensor):
                return torch.tensor(math.nan)
            value = local_shard(root.detach())
            products.append((value if factor is None else value * local_shard(factor)).sum())
    total = sum(products[1:], products[0])
    return total.real if total.is_complex() else total


def _sum(losses: list[Tensor]) -> float:
    """Their sum; NaN if there are none. Waits for the device."""
    return sum(float(loss) for loss in losses) if losses else math.nan


def _spacing(losses: list[Tensor]) -> float:
    return max((torch.finfo(loss.dtype).eps for loss in losses if loss.is_floating_point()), default=0.0)


def _tolerance(losses: list[Tensor]) -> float:
    """Relative differences that kernels make which add in no fixed order, or in low precision."""
    spacing = _spacing(losses)
    return 1e-6 if spacing < 1e-10 else max(1e-3, 4 * spacing)
