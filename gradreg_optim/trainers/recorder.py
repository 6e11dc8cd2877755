"""Records the micro-batches of a window of gradient accumulation, and refuses what a second pass could not repeat."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from gradreg_optim.core.repeatable import RandomState
from gradreg_optim.drivers.micro_batches import SplitGradient
from gradreg_optim.trainers.generations import Recorded
from gradreg_optim.trainers.snapshot import Snapshot, copied


@dataclass
class MicroBatch:
    """The state before the first pass over a micro-batch, and the results of that pass.

    ``generations`` holds results of methods that are not called again, ``log_p`` the log-probabilities of completions that
    ``resample`` needs, ``clipped_before`` how many clipped fractions the trainer had logged. ``go_on`` puts buffers back, if
    micro-batches before this one are not repeated.
    """

    model: nn.Module
    inputs: Any
    num_items_in_batch: Any
    random: RandomState
    state: Snapshot
    is_last: bool
    loss: Tensor | None = None
    generations: list[Recorded] = field(default_factory=list)
    log_p: list[Tensor] = field(default_factory=list)
    go_on: Callable[[], None] | None = None
    clipped_before: dict[str, int] = field(default_factory=dict)


class Recorder:
    """Records the micro-batches of one window. Before the first window it has no plan, and records nothing.

    ``is_summed``: with ``fraction``, the gradient has to be complete over ranks after the current micro-batch.
    """

    def __init__(self, trainer: Trainer, plan: Any = None, storage: Any = None, buffers: Any = None) -> None:
        self.plan, self.storage, self.buffers = plan, storage, buffers
        self.micro_batches: list[MicroBatch] = []
        self.split: SplitGradient | None = None
        self.is_summed = False
        self._trainer = trainer
        self._is_open = False  # True from the beginning of a micro-batch to the end of its backward
        self._current: MicroBatch | None = None  # the micro-batch whose loss was recorded last
        if plan is not None and plan.regularizes and plan.fraction < 1:
            if trainer.args.gradient_accumulation_steps == 1:
                raise ValueError(
                    f"fraction={plan.fraction!r} repeats a fraction of the micro-batches of a step, but each step has only "
                    "one (gradient_accumulation_steps=1). Accumulate more, and reduce per_device_train_batch_size by the "
                    "same factor; or leave fraction at 1."
                )
            self.split = SplitGradient(storage, plan, trainer.current_gradient_accumulation_steps)

    def begin_micro_batch(self) -> None:
        """Expect a loss. With ``fraction``, reduce the gradient over ranks wherever the repeated part begins or ends."""
        self._is_open, self._current = self.plan.regularizes, None
        self.is_summed = self.split is not None and self.split.ends_after(len(self.micro_batches))
        model: Any = self._trainer.model_wrapped
        if self.is_summed and isinstance(model, DistributedDataParallel):  # inside its no_sync(), which restores the flag
            model.require_backward_grad_sync = True
        elif self.is_summed and isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(True)

    def record(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> MicroBatch | None:
        """Record the state before a loss is computed; ``None`` outside the micro-batches of a regularized window."""
        if not self._is_open:
            return None
        if self._current is not None:
            raise not_repeatable(self._trainer, "compute_loss was called twice in one micro-batch")
        random, is_last = RandomState(self.storage.devices), self._trainer.accelerator.sync_gradients
        state = Snapshot(self._trainer)
        self._current = MicroBatch(model, copied(inputs), num_items_in_batch, random, state, is_last)
        position = len(self.micro_batches)
        if position == 0:
            self.buffers.begin(model, *(value for value in vars(self._trainer).values() if isinstance(value, nn.Module)))
        elif self.split is not None and position in self.split.part and position - 1 not in self.split.part:
            self._current.go_on = self.buffers.mark()
        self.micro_batches.append(self._current)
        return self._current

    def record_loss(self, loss: Tensor) -> bool:
        """Record the loss whose backward is about to run; False if the window is not regularized."""
        if self.plan is None or not self.plan.regularizes:
            return False
        if not self._is_open or self._current is None:
            raise not_repeatable(self._trainer, "accelerator.backward got a loss that is not compute_loss's")
        self._current.loss = loss.detach()
        return True

    def close_micro_batch(self) -> None:
        """Record that the gradient of the micro-batch is accumulated."""
        self._is_open = False
        if self.split is not None:
            self.split.close(len(self.micro_batches) - 1)


def not_repeatable(trainer: Trainer, what: str) -> RuntimeError:
    """Return the error about a trainer that does ``what``, which a second pass cannot repeat."""
    return RuntimeError(
        f"{type(trainer).__name__}: {what}. The second pass repeats micro-batches of one compute_loss and one "
        "accelerator.backward each. It would leave out or change the penalty of any other step. "
        "Call optimizer.step(closure) in a training loop of your own, or train without GradRegOptimizer."
    )
