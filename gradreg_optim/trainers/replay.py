"""The second pass of a trainer: repeats the recorded micro-batches, each from the state before its first pass."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer

from gradreg_optim.core.repeatable import RandomState
from gradreg_optim.trainers.generations import Generations
from gradreg_optim.trainers.hooks import Hooks
from gradreg_optim.trainers.old_policy import LOG_P_METHOD, OldPolicy, clipped_so_far, has_old_policy
from gradreg_optim.trainers.recorder import MicroBatch
from gradreg_optim.trainers.snapshot import copied, untouched
from gradreg_optim.trainers.unfused import unfused


@dataclass
class Replay:
    """Repeats micro-batches through the Trainer's own ``training_step``, which scales losses as its version does.

    Nothing is generated or scored again; metrics and counters of the trainer are restored afterwards. ``is_running`` is
    True in the meantime, so that hooks on the trainer do not record.
    """

    trainer: Trainer
    generations: Generations
    old_policy: OldPolicy
    is_running: bool = False

    def run(self, optimizer: Any, micro_batches: list[MicroBatch]) -> Iterator[MicroBatch]:
        """Repeat ``micro_batches`` at the current weights; yields each one after its backward."""
        is_engine = hasattr(optimizer, "held_step")  # DeepSpeed's, which decides itself when to reduce gradients
        with self._prepared(optimizer), torch.enable_grad(), self._twice_differentiable(optimizer, micro_batches):
            for micro_batch in micro_batches:
                is_last = micro_batch is micro_batches[-1]
                with nullcontext() if is_last or is_engine else self.trainer.accelerator.no_sync(micro_batch.model):
                    self._repeat(optimizer.resample, micro_batch, is_last)
                yield micro_batch

    def _twice_differentiable(self, optimizer: Any, micro_batches: list[MicroBatch]) -> AbstractContextManager[None]:
        """For ``method="exact"``, compute losses without fused kernels; refuse a ``resample`` that it does not measure."""
        if optimizer.param_groups[0]["gradreg_method"] != "exact":
            return nullcontext()
        is_recomputed = hasattr(self.trainer, LOG_P_METHOD) and not has_old_policy(micro_batches[0].inputs)
        if optimizer.resample == "sequence" or (optimizer.resample == "reuse" and is_recomputed):
            raise RuntimeError(
                f"{type(self.trainer).__name__}: method='exact' differentiates the loss twice with a constant old policy. "
                f"That is not what resample={optimizer.resample!r} measures. Pass resample='importance', or "
                "method='forward' or 'central'."
            )
        return unfused()

    @contextmanager
    def _prepared(self, optimizer: Any) -> Iterator[Hooks]:
        """Let the block repeat micro-batches; afterwards restore trainer, random numbers, buffers and engine."""
        trainer: Any = self.trainer
        gradient_state = trainer.accelerator.gradient_state
        held_step = getattr(optimizer, "held_step", None)  # of a DeepSpeed engine, whose timer forwards restart
        with (
            untouched(trainer),
            RandomState(optimizer.storage().devices).replayed(),
            optimizer._buffers.repeated(),
            nullcontext() if held_step is None else held_step.repeated(),
            Hooks() as replaced,
        ):
            trainer.log = lambda *_, **__: None  # ``untouched`` restores both methods
            if not self.generations.methods:
                trainer._prepare_inputs = lambda inputs: inputs
            replaced.set(self, "is_running", True)
            replaced.set(self.generations, "repeated", None)
            replaced.callback(gradient_state._set_sync_gradients, gradient_state.sync_gradients)
            yield replaced

    def _repeat(self, resample: str, micro_batch: MicroBatch, is_last: bool) -> None:
        """Run the training step of one micro-batch from its recorded state: the Trainer's own, or a whole one."""
        trainer, inputs = self.trainer, copied(micro_batch.inputs)
        micro_batch.state.restore()
        micro_batch.clipped_before = clipped_so_far(trainer)
        micro_batch.random.restore()
        if micro_batch.go_on is not None:
            micro_batch.go_on()
        trainer.accelerator.gradient_state._set_sync_gradients(is_last)
        self.generations.repeated = iter(micro_batch.generations)
        is_whole = bool(self.generations.methods)
        step = trainer.training_step if is_whole else functools.partial(Trainer.training_step, trainer)
        # TRL's activation offloading has to be entered anew for each training step, or later backwards free nothing.
        offloading = getattr(trainer, "maybe_activation_offload_context", nullcontext())
        with offloading, self.old_policy.repeating(resample, inputs, micro_batch.log_p):
            step(micro_batch.model, inputs, micro_batch.num_items_in_batch)

    def check(self, optimizer: Any, micro_batch: MicroBatch) -> None:
        """Repeat the loss of ``micro_batch`` at θ; raise on every rank if it differs from the recorded one on one of them.

        Costs one forward, and a second, with gradients, for a loss that differentiates by itself or looks whether it may.
        Under FSDP2 it costs one with gradients and its backward: the end of a backward is what ends a forward there.
        """
        accelerator: Any = self.trainer.accelerator
        recorded = repeated = equal = cast(Tensor, micro_batch.loss)
        for enabled in (True,) if is_fsdp2(micro_batch.model) else (False, True):
            try:
                repeated = self._repeated_loss(optimizer, micro_batch, enabled)
            except RuntimeError as error:  # of autograd, perhaps, which finds nothing to differentiate
                if enabled or isinstance(error, torch.OutOfMemoryError):
                    raise
                repeated = recorded + math.inf
            # Equal up to kernels that add in no fixed order: a bf16 loss has three digits, and GRPO's cancels to about 0.
            equal = torch.isclose(repeated.float(), recorded.float(), rtol=1e-3, atol=1e-5, equal_nan=True)
            if accelerator.reduce((~equal).float(), "sum") == 0:
                return
        # All ranks raise, or the others would wait for the one that did.
        raise RuntimeError(
            f"{type(self.trainer).__name__}: the first loss was {float(recorded)!r}, and {float(repeated)!r} when it was "
            f"repeated at the same weights{' (they differ on another rank)' if equal else ''}. The second pass needs a loss "
            "that depends on weights, inputs and random numbers alone. Keep state of the loss in plain attributes of "
            "the trainer, which are restored for the second pass, or train without GradRegOptimizer."
        )

    def _repeated_loss(self, optimizer: Any, micro_batch: MicroBatch, enabled: bool) -> Tensor:
        """The loss of ``micro_batch`` at the current weights, computed with gradients ``enabled`` or without."""
        losses: list[Tensor] = []
        accelerator: Any = self.trainer.accelerator
        has_backward = is_fsdp2(micro_batch.model)

        def backward(loss: Tensor, **_: Any) -> None:
            losses.append(loss.detach())
            if has_backward:
                torch.autograd.backward(loss)

        with self._prepared(optimizer) as replaced, torch.set_grad_enabled(enabled), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "None of the inputs have requires_grad=True")  # reentrant checkpointing
            replaced.set(accelerator, "backward", backward)
            for parameter in micro_batch.model.parameters():  # a loss may run a backward
                replaced.callback(setattr, parameter, "grad", parameter.grad)
                parameter.grad = None
            reduces = not enabled or has_backward or hasattr(optimizer, "held_step")
            with nullcontext() if reduces else accelerator.no_sync(micro_batch.model):
                self._repeat(optimizer.resample, micro_batch, micro_batch.is_last)
        return losses[0]


def is_fsdp2(model: nn.Module) -> bool:
    """Whether parts of ``model`` are sharded by FSDP2."""
    return any(isinstance(module, FSDPModule) for module in model.modules())
