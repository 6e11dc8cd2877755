"""What the algorithm asks of the place where a process keeps gradients and weights."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from gradreg_optim.core.step import FirstGradient, Gradients, Scalar


class Storage(Protocol):
    """Gradients and weights of this process.

    See :mod:`gradreg_optim.core.local` and :mod:`gradreg_optim.zero.storage`.
    """

    @property
    def loss_scale(self) -> float:
        """The factor that gradients carry: the loss scale, and the share 1/n of one of n micro-batches."""

    def apart(self) -> AbstractContextManager[None]:
        """Keep gradients of earlier micro-batches out of the block's reach; then add those that it leaves.

        If the block raises, they are as before.
        """

    @property
    def overflow_skips_step(self) -> bool:
        """Whether the loss scaler skips steps with gradients that are not finite, which it then must see."""

    def check_first_pass(self) -> None:
        """Raise ``RuntimeError`` if something else has used the gradients that the first pass left."""

    @property
    def first_pass_moved(self) -> bool:
        """Whether the first pass wrote weights, as an initialization that depends on data does."""

    def take(self, strengths: Sequence[float], excluded: Sequence[frozenset[int]]) -> FirstGradient:
        """Take the gradients out of reach of the next backward; if that raises, they are as before.

        g1 are those of the groups whose strength is not 0, but for the parameters at the
        positions in ``excluded``.
        """

    @property
    def devices(self) -> set[torch.device]:
        """Where a loss may draw random numbers."""

    @property
    def has_low_precision(self) -> bool:
        """Whether weights, or what the engine computes with, have fewer bits than float32."""

    def has_gradient(self, first: FirstGradient) -> bool:
        """Whether there is anything to regularize; the same answer on every rank."""

    @property
    def loss_ranks(self) -> int:
        """The number of ranks in :meth:`sum_over_ranks`; the loss of a step is the mean of their losses."""

    def moved(
        self,
        first: FirstGradient,
        steps: list[Scalar],
        *,
        seed: int | None,
        measured: bool,
        signs: int | None = None,
    ) -> AbstractContextManager[None]:
        """Move the weights to θ + step·g1 inside the block, back to θ after it, at once or later.

        Each group has its own step. ``seed`` is that of stochastic rounding, ``None`` rounds to nearest.
        ``measured``: note in the groups how much of the step arrived. With ``signs`` the elements of g1 take
        random signs and places. These depend on the seed, the tensor's place and its shape alone, so ranks
        that hold the same tensors draw the same.
        """

    def last(self, first: FirstGradient) -> Gradients:
        """The gradients of the last point, in the place from which the wrapped optimizer will step."""

    def laid_out(self, first: FirstGradient, gradients: Any) -> Gradients:
        """The result of :meth:`take_sum` or :meth:`see_sum`, laid out like g1; 0 for a missing gradient."""

    def sum_over_ranks(self, sums: Tensor) -> Tensor:
        """Sums over this process's tensors, completed over all ranks that hold parts of them."""

    def sum_over_replicas(self, sums: Tensor) -> Tensor:
        """Sums over ranks whose own gradients are regularized (:mod:`gradreg_optim.core.replicas`)."""

    def put_back(self, first: FirstGradient) -> None:
        """Leave g1 where the wrapped optimizer reads gradients, as if there had been no further pass."""

    def abandon(self, first: FirstGradient) -> None:
        """After an exception: the weights are at θ, bit for bit, and g1 is back."""

    def keep(self, first: FirstGradient) -> None:
        """The combined gradient is in its place: forget g1."""

    def take_sum(self) -> Any:
        """The gradients that have been accumulated, out of reach of the next backward."""

    def see_sum(self) -> Any:
        """The gradients that have been accumulated, in their places."""
