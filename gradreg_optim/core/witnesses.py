"""Witnesses: what each step computes anyway, and what it tells about the step.

The change of the loss proves that all passes are passes of one function. By the trapezoid rule

    loss_check = (L(θ') − L(θ)) / (ε·⟨d, (g1 + g2)/2⟩) = 1 + O(ε²)

A loss that draws another batch at each call, counts its calls or moves a teacher changes by more, and
(g2 − g1)/ε is then the difference of two functions, divided by ε. ``loss_check`` is near 1 up to the
spacing of the loss in these units, |L|·2⁻²⁴/(ε·⟨d, g⟩) in float32. It is an alarm if it is off by more
than 0.25 + 8 spacings.

A loss with stop-gradients (a ratio to the policy itself, a target network of the same weights) is not the
integral of its gradient, and the formula does not hold. So in the first regularized step an alarm has the
last pass repeated where it was: if the loss is another number, the step raises; if it is the same,
``loss_check`` is left out of this run.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from gradreg_optim.core.local import local_shard
from gradreg_optim.core.multi_tensor import inner
from gradreg_optim.core.same_start import as_tuple, backward_replaced
from gradreg_optim.core.schemes import ratio, stack_scalars
from gradreg_optim.core.step import Figure, FirstGradient, OfOneOptimizer, Outcome, Scalar, computed
from gradreg_optim.core.storage import Storage
from gradreg_optim.core.strength import AIM

FAR, FAR_IF_LOW = 0.25, 1.0
"""Alarming distance of ``loss_check`` from 1, beyond 8 spacings of the loss; low precision is noisier."""
BEYOND = 2.0
"""Distance that is an alarm at once. A smaller one has to last for ``STREAK`` steps."""
STREAK = 3
MANY = 20
"""Steps over which the mean of ``penalty_ratio`` is taken."""
LITTLE, MUCH = 0.01, 10.0
"""Bounds of a ``penalty_ratio`` that causes no warning."""
UNREAD = 10
"""Steps after which symptoms are read at the latest."""


class Losses(OfOneOptimizer):
    """Records what the passes of a step differentiate: the arguments of ``backward``, or a closure's result.

    ``passes`` holds the losses of each pass of the step so far. ``is_integral``: whether the loss is the
    integral of its gradient; ``None`` until an informative step has told. Communication: under
    DistributedDataParallel one all_reduce of two numbers a step; elsewhere the losses join the sums of
    :meth:`~gradreg_optim.core.storage.Storage.sum_over_ranks`.
    """

    def __init__(self) -> None:
        self.is_integral: bool | None = None
        self._largest: Tensor | None = None
        self._modules: Iterable[nn.Module] = ()
        self._waiting: Collection[nn.Module] = ()
        self.passes: list[list[Tensor]] = []

    def begun(self, modules: Iterable[nn.Module], waiting: Collection[nn.Module]) -> Losses:
        """Forget the last step; ``modules`` is the collection of those that will have run in this one.

        ``waiting``: those of them that reduce no gradients yet, so that this rank's loss counts.
        """
        self.passes, self._modules, self._waiting = [], modules, waiting
        return self

    def note(self, tensors: Any, grad_tensors: Any) -> None:
        """Note what a backward of the pass that began last differentiates."""
        self.passes[-1].append(_differentiated(tensors, grad_tensors))

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Around backwards of the pass that began last."""

        def noted(
            backward: Callable[..., None], tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any
        ) -> None:
            tensors, grad_tensors = as_tuple(tensors), as_tuple(grad_tensors)
            self.note(tensors, grad_tensors)
            backward(tensors, grad_tensors, *args, **kwargs)

        with backward_replaced(noted):
            yield

    def last_was_skipped(self) -> bool:
        """Whether the last pass, which left no gradient, had a loss that is not finite or ran no backward."""
        return not math.isfinite(_sum(self.passes[-1])) and (
            bool(self.passes[-1]) or self.is_integral is not None
        )

    def change(self, storage: Storage) -> list[Scalar]:
        """This rank's share of L(θ') − L(θ) and of |L(θ)|, in units of the loss; empty if unknown."""
        start, end = self.passes[0], self.passes[-1]
        groups = self._replicas(storage)
        if not start or not end or self.is_integral is False or groups is None:
            return []
        factor = 1 / (storage.loss_scale * storage.loss_ranks)
        size = _total(start).abs() * factor
        # Rounding is that of the loss's terms, which do not vanish with it. An overflow tells nothing.
        largest = torch.zeros_like(size) if self._largest is None else self._largest.to(size)
        self._largest = torch.where(size.isfinite(), torch.maximum(size, largest), largest)
        both = [(_total(end) - _total(start)) * factor, self._largest]
        for group, device in groups:
            means = torch.stack(both).to(device)
            distributed.all_reduce(means, group=group)
            both = list((means / distributed.get_world_size(group)).unbind())
        return list(both)

    def _replicas(self, storage: Storage) -> list[tuple[Any, torch.device]] | None:
        """Process groups over which gradients were averaged, besides the storage's; ``None`` if unknown."""
        if self._waiting:
            return []
        models = (module for module in self._modules if isinstance(module, DistributedDataParallel))
        replicas = [
            *((model.process_group, model.device) for model in models),
            *getattr(storage, "replicas", ()),
        ]
        is_parallel = (
            distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
        )
        if is_parallel and storage.loss_ranks == 1 and not replicas:
            return None
        return list({id(group): (group, device) for group, device in replicas}.values())

    @property
    def spacing(self) -> float:
        """The relative spacing of the losses' dtype."""
        return max(
            (torch.finfo(loss.dtype).eps / 2 for loss in self.passes[0] if loss.is_floating_point()),
            default=0.0,
        )

    def are_far(self, storage: Storage, first: FirstGradient) -> bool:
        """Whether the loss at θ' is far from what the gradients tell, in the first step. Waits."""
        if self.is_integral is not None or not (shares := self.change(storage)):
            return False
        second = storage.laid_out(first, storage.see_sum())
        pairs = [
            (group.counted(g2), group.counted(group.g1))
            for group, g2 in zip(first.groups, second, strict=True)
        ]
        products = [inner(*pair) for pair in pairs]
        sums = storage.sum_over_ranks(stack_scalars([*products, *shares]))
        steps = stack_scalars([group.eps for group in first.groups], sums) * first.clip
        squares = first.g1_squared.to(sums) / first.clip**2
        expected = float((steps * (squares + sums[:-2] / storage.loss_scale**2)).sum() / 2)
        change, size = sums[-2:].tolist()
        if not math.isfinite(change) or not math.isfinite(expected) or not expected:
            return False
        far = FAR_IF_LOW if first.is_low else FAR
        self.is_integral = abs(change / expected - 1) <= far + 8 * self.spacing * size / abs(expected)
        return not self.is_integral

    def require_same(self, storage: Storage) -> None:
        """Raise on every rank if on any rank the losses of the last two passes, at the same point, differ."""
        loss, again = _sum(self.passes[-2]), _sum(self.passes[-1])
        tolerance = 1e-6 if self.spacing < 1e-10 else max(1e-3, 8 * self.spacing)
        is_same = math.isclose(loss, again, rel_tol=tolerance, abs_tol=tolerance * storage.loss_scale / 100)
        is_same = is_same or (math.isnan(loss) and math.isnan(again))
        differs = torch.tensor([float(not is_same)], dtype=torch.float64)
        total = storage.sum_over_ranks(differs)
        for group, device in self._replicas(storage) or ():
            total = total.to(device)
            distributed.all_reduce(total, group=group)
        if float(total):
            self.is_integral = None
            raise RuntimeError(
                f"The loss is not a function of the weights: it was {loss!r} in the second pass and "
                f"{again!r} when that was repeated at the same weights, from the same random numbers and "
                f"buffers{' (the losses differ on another rank)' if is_same else ''}. The difference of "
                "the two gradients would measure this change. Draw the batch before the closure, or before "
                "the loop over passes(), and masks from torch's global generators, or seed your own "
                "generator in each call."
            )


@dataclass
class Evidence:
    """The scalars that test a step, without its tensors; figures are computed on request.

    ``losses`` are the change of the loss and its size, ``spacing`` that of its dtype; ``losses`` is ``None``
    if they tell nothing. The others are those of :class:`~gradreg_optim.core.step.FirstGradient` and
    :class:`~gradreg_optim.core.step.Difference`.
    """

    eps: list[Scalar]
    clip: Scalar
    norm: Tensor
    g1_squared: Tensor
    ahead: Tensor
    squares: Tensor
    losses: Tensor | None
    spacing: float
    is_low: bool
    g2_norm: Figure
    fidelity: Figure
    penalty_ratio: Figure

    def _changes(self) -> tuple[Tensor, Tensor, Tensor]:
        """The change of the loss, its size, and the change expected from gradients, ε·⟨d, (g1 + g2)/2⟩."""
        change, size = self.losses.to(self.ahead.device).unbind()  # type: ignore[union-attr]
        eps = stack_scalars(self.eps, self.ahead)
        return change, size, (eps * (self.g1_squared / self.clip + self.ahead)).sum() / 2

    def loss_check(self) -> Tensor:
        """(L(θ') − L(θ)) / (ε·⟨d, (g1 + g2)/2⟩); 0 if the gradient vanishes."""
        change, _, expected = self._changes()
        return ratio(change, expected)

    def off_by(self) -> Tensor:
        """How far ``loss_check`` is from 1, beyond 8 spacings of the loss; 0 if the gradient vanishes."""
        change, size, expected = self._changes()
        return ratio(((change - expected).abs() - 8 * self.spacing * size).clamp(min=0), expected.abs())

    def symptoms(self) -> Tensor:
        """What :meth:`Witnesses.look` reads."""
        relative = ratio(self.squares.sum(), self.g1_squared.sum()).sqrt()
        far = FAR_IF_LOW if self.is_low else FAR
        off = torch.zeros_like(relative) if self.losses is None else self.off_by() / far
        apart = (ratio(computed(self.g2_norm), self.norm) - 1).abs()
        return stack_scalars(
            [off, computed(self.fidelity), apart, relative, computed(self.penalty_ratio)], relative
        )


class Witnesses:
    """Reads the symptoms of the last steps, and tells the user once of each kind of trouble.

    Symptoms are read every ``UNREAD`` steps, with the metrics, in the steps of a check, and of a step
    that disproved itself.
    """

    def __init__(self) -> None:
        self._unread: deque[Callable[[], Tensor]] = deque()
        self._streaks: dict[str, int] = {}
        self._ratios: list[float] = []
        # Whether the first ``MANY`` steps are not over: later, gradients and curvature vanish.
        self._is_young = True
        self._told: set[str] = set()

    def note(self, outcome: Outcome) -> None:
        """Take in what a step found."""
        if outcome.check is not None and outcome.check.advice is not None:
            self.warn("check", outcome.check.advice)
        if outcome.symptoms is not None:
            self._unread.append(outcome.symptoms)
            if outcome.is_disproved or outcome.check is not None or len(self._unread) >= UNREAD:
                self.look()

    def look(self) -> None:
        """Read what has not been read. Waits for the device."""
        while self._unread:
            off, fidelity, norms_apart, relative, penalty_ratio = self._unread.popleft()().tolist()
            # A penalty of curvature changes the norm of g2 in proportion to its length; a clip keeps it the
            # same.
            are_equal = norms_apart < 1e-6 and relative > 1e-5 and norms_apart < relative / 30
            if off * FAR > BEYOND or self._lasts("loss", off > 1):
                self.tell(
                    "loss",
                    "the loss changed between the passes by other than what the gradients tell (loss_check "
                    f"is off by {off:.2g} times what noise explains)",
                    "a teacher, memory bank or counter that moves in each forward; a batch that is drawn or "
                    "changed in the pass; a generator of the loss's own; a loss with stop-gradients",
                    "draw batches and masks before the passes, keep such state in buffers, or update it "
                    "after step(); where the difference is meant, nothing is wrong",
                )
            if self._lasts("fidelity", fidelity < 0.5):
                self.tell(
                    "fidelity",
                    f"{fidelity:.2g} of the step to θ' arrived in the weights (perturbation_fidelity)",
                    "a step far below the spacing of the weights: small gradients times eps, or "
                    "half-precision weights",
                    "set radius=0.005, or leave eps and radius out in half precision",
                )
            if self._lasts("norms", are_equal):
                self.tell(
                    "norms",
                    "‖g1‖ and ‖g2‖ are equal in each step although the gradients differ",
                    "gradients that are clipped or normalized inside each pass",
                    "clip after the passes: `for _ in optimizer.passes(): …`, then clip, "
                    "then optimizer.step()",
                )
            self._ratios.append(penalty_ratio)
            if len(self._ratios) == MANY:
                self._tell_ratio(sum(self._ratios) / MANY)
                self._ratios.clear()
                self._is_young = False

    def _tell_ratio(self, mean: float) -> None:
        if mean > MUCH:
            self.tell(
                "much",
                f"over {MANY} steps the penalty was {mean:.3g} times as long as the gradient "
                "(penalty_ratio), which it swamps",
                "a strength for another loss, batch or model",
                f"multiply strength by {AIM / mean:.1g}, so that the ratio is near {AIM:g}, leave it out, or "
                "set max_penalty_ratio",
            )
        elif mean < LITTLE and self._is_young:
            self.tell(
                "little",
                f"over {MANY} steps the penalty was {mean:.3g} of the gradient (penalty_ratio): it "
                "changes next to nothing",
                "a strength for another loss or model, such as the published one with LoRA; "
                "gradients that vanish",
                f"raise strength until the ratio is near {AIM:g}, or leave it out, and it is found",
            )

    def _lasts(self, kind: str, is_now: bool) -> bool:
        self._streaks[kind] = self._streaks.get(kind, 0) + 1 if is_now else 0
        return self._streaks[kind] == STREAK

    def tell(self, kind: str, seen: str, causes: str, remedy: str) -> None:
        """Warn once of each kind: what was seen, its usual causes, the remedy."""
        self.warn(kind, f"Gradient regularization: {seen}. Usual causes: {causes}. Remedy: {remedy}.")

    def warn(self, kind: str, message: str) -> None:
        """Warn, unless that has been done."""
        if kind not in self._told:
            self._told.add(kind)
            warnings.warn(message, stacklevel=4)


def _differentiated(tensors: Any, grad_tensors: Any) -> Tensor:
    """The number whose gradient ``backward`` computes with these arguments; NaN if they are graph edges."""
    roots = (tensors,) if isinstance(tensors, Tensor) else tensors
    factors = (grad_tensors,) if isinstance(grad_tensors, Tensor) else grad_tensors or [None] * len(roots)
    products = []
    with torch.no_grad():
        for root, factor in zip(roots, factors, strict=False):
            if not isinstance(root, Tensor):
                return torch.tensor(math.nan)
            value = root.detach()
            if hasattr(value, "to_local"):
                value, factor = value.to_local(), None if factor is None else local_shard(factor)
            product = value if factor is None else value * factor
            # Users add to losses in place.
            products.append(product.sum() if product.ndim else product.clone())
    total = sum(products[1:], products[0])
    return total.real if total.is_complex() else total


def _total(losses: list[Tensor]) -> Tensor:
    """The sum of a pass's losses, in float32 at least."""
    wide = [loss if loss.dtype == torch.float64 else loss.float() for loss in losses]
    return sum(wide[1:], wide[0])


def _sum(losses: list[Tensor]) -> float:
    """Their sum; NaN if there are none. Waits for the device."""
    return float(_total(losses)) if losses else math.nan
