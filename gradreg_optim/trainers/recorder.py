"""Records what every micro-batch of a window starts from, and refuses whatever could not be repeated."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from gradreg_optim.core.plan import Plan
from gradreg_optim.core.repeatable import RandomState
from gradreg_optim.core.storage import Storage
from gradreg_optim.drivers.micro_batches import SplitGradient
from gradreg_optim.trainers.generations import Recorded
from gradreg_optim.trainers.isolation import copied, counters


@dataclass
class MicroBatch:
    """What the first pass over a micro-batch started from, and its loss.

    ``generations`` are the results of methods that are not called again, ``log_p`` the log-probabilities of completions, for
    ``resample``.
    """

    model: nn.Module
    inputs: Any
    num_items_in_batch: Any
    random: RandomState
    counters: dict[str, Any]
    is_last: bool
    loss: Tensor | None = None
    generations: list[Recorded] = field(default_factory=list)
    log_p: list[Tensor] = field(default_factory=list)


class Expected(Enum):
    """What a trainer does next in a micro-batch that is recorded."""

    NOTHING = auto()
    """The window is not regularized."""
    LOSS = auto()
    BACKWARD = auto()
    NEXT_MICRO_BATCH = auto()


class Recorder:
    """The window under way: its plan, and its micro-batches so far."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.reset()

    def reset(self) -> None:
        """Forget the window."""
        self.micro_batches: list[MicroBatch] = []
        self.expected = Expected.NOTHING
        self.plan: Any = None
        self.storage: Any = None
        self.split: SplitGradient | None = None

    def begin_window(self, plan: Plan, storage: Storage) -> None:
        """The plan of the window that begins with the next micro-batch."""
        self.plan, self.storage, self.split = plan, storage, None
        if plan.regularizes and plan.fraction < 1:
            if self._trainer.args.gradient_accumulation_steps == 1:
                raise ValueError(
                    f"fraction={plan.fraction!r} takes the difference on some of a step's micro-batches, and there is one "
                    "(gradient_accumulation_steps=1). Accumulate more, and make per_device_train_batch_size smaller by as "
                    "much; or leave fraction at 1."
                )
            self.split = SplitGradient(storage, plan, self._trainer.current_gradient_accumulation_steps)

    def begin_micro_batch(self) -> None:
        """With ``fraction``, see to it that the gradient is reduced over ranks wherever the part begins or ends."""
        self.expected = Expected.LOSS if self.plan.regularizes else Expected.NOTHING
        if self.split is not None and self.split.ends_after(len(self.micro_batches)):
            model: Any = self._trainer.model_wrapped
            if isinstance(model, DistributedDataParallel):  # inside its no_sync(), which puts this back
                model.require_backward_grad_sync = True
            elif isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(True)

    def record(self, model: nn.Module, inputs: Any, num_items_in_batch: Any, devices: set[torch.device]) -> MicroBatch:
        """What the loss that is about to be computed starts from."""
        self.expected = Expected.BACKWARD
        micro_batch = MicroBatch(
            model=model,
            inputs=copied(inputs),
            num_items_in_batch=num_items_in_batch,
            random=RandomState(devices),
            counters=counters(vars(self._trainer)),
            is_last=self._trainer.accelerator.sync_gradients,
        )
        self.micro_batches.append(micro_batch)
        return micro_batch

    def check_loss(self) -> None:
        """Refuse a second loss in one micro-batch."""
        if self.expected is Expected.BACKWARD:
            raise not_repeatable(self._trainer, "compute_loss was called twice in one micro-batch")

    def check_backward(self) -> None:
        """Refuse the backward of something else."""
        if self.expected in (Expected.LOSS, Expected.NEXT_MICRO_BATCH):
            raise not_repeatable(self._trainer, "accelerator.backward got a loss that is not compute_loss's")

    def close_micro_batch(self) -> None:
        """Its gradient is accumulated."""
        self.expected = Expected.NEXT_MICRO_BATCH
        if self.split is not None:
            self.split.close(len(self.micro_batches) - 1)


def not_repeatable(trainer: Trainer, what: str) -> RuntimeError:
    """The error about a trainer that does what a second pass cannot repeat."""
    return RuntimeError(
        f"{type(trainer).__name__}: {what}. A second pass repeats micro-batches of one compute_loss and one "
        "accelerator.backward each; with anything else the step would not be regularized, or wrongly. "
        "Call optimizer.step(closure) in a training loop of your own, or train without GradRegOptimizer."
    )
