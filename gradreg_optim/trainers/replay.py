"""The second pass of a trainer: its recorded micro-batches once more, each from where it started."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer

from gradreg_optim.core.repeatable import RandomState, batch_norm_statistics_kept
from gradreg_optim.trainers.generations import Generations
from gradreg_optim.trainers.isolation import copied, counters, untouched
from gradreg_optim.trainers.old_policy import METHOD, OldPolicy, is_given
from gradreg_optim.trainers.recorder import MicroBatch
from gradreg_optim.trainers.unfused import unfused


class Replay:
    """Repeats micro-batches through the Trainer's own ``training_step``, which scales losses as its version does.

    Nothing is generated or scored again, and what the pass counts or logs on the trainer is dropped. ``is_running`` tells
    listeners to keep out of it.
    """

    def __init__(self, trainer: Trainer, generations: Generations, old_policy: OldPolicy, *, whole_steps: bool) -> None:
        self.is_running = False
        self._trainer = trainer
        self._generations = generations
        self._old_policy = old_policy
        self._whole_steps = whole_steps

    def run(self, optimizer: Any, micro_batches: list[MicroBatch]) -> Iterator[MicroBatch]:
        """Repeat ``micro_batches`` at the weights as they are; yields each one after its backward."""
        accelerator = self._trainer.accelerator
        held_step = getattr(optimizer, "held_step", None)  # of a DeepSpeed engine
        with (
            self._prepared(optimizer),
            torch.enable_grad(),
            nullcontext() if held_step is None else held_step.repeated(),
            batch_norm_statistics_kept(optimizer._model),
            self._twice_differentiable(optimizer, micro_batches),
        ):
            for micro_batch in micro_batches:
                is_last = micro_batch is micro_batches[-1]
                gathers_alone = is_last or held_step is not None
                with nullcontext() if gathers_alone else accelerator.no_sync(micro_batch.model):
                    self._repeat(optimizer.resample, micro_batch, is_last)
                yield micro_batch

    def _twice_differentiable(self, optimizer: Any, micro_batches: list[MicroBatch]) -> AbstractContextManager[None]:
        """For second derivatives, losses without fused kernels; they hold the old policy fixed, which has to be wanted."""
        if optimizer.param_groups[0]["gradreg_method"] != "exact":
            return nullcontext()
        recomputes = hasattr(self._trainer, METHOD) and not is_given(micro_batches[0].inputs)
        if optimizer.resample == "sequence" or (optimizer.resample == "reuse" and recomputes):
            raise RuntimeError(
                f"{type(self._trainer).__name__}: method='exact' differentiates the loss twice, with the policy that drew "
                f"the completions held fixed: that is not what resample={optimizer.resample!r} measures. Pass "
                "resample='importance', or method='forward' or 'central'."
            )
        return unfused()

    @contextmanager
    def _prepared(self, optimizer: Any) -> Iterator[ExitStack]:
        """Let the block repeat micro-batches; afterwards trainer and random numbers are where they were."""
        gradient_state = self._trainer.accelerator.gradient_state
        with untouched(self._trainer), RandomState(optimizer.storage().devices).replayed(), ExitStack() as done:
            self.is_running = True
            done.callback(setattr, self, "is_running", False)
            done.callback(self._generations.record, None)
            done.callback(gradient_state._set_sync_gradients, gradient_state.sync_gradients)
            yield done

    def _repeat(self, resample: str, micro_batch: MicroBatch, is_last: bool) -> None:
        """Run one micro-batch through the Trainer's own training step, or a whole step of the trainer, where it started."""
        trainer, inputs = self._trainer, copied(micro_batch.inputs)
        vars(trainer).update(counters(micro_batch.counters))
        micro_batch.random.restore()
        trainer.accelerator.gradient_state._set_sync_gradients(is_last)
        self._generations.repeat(micro_batch.generations)
        step = trainer.training_step if self._whole_steps else functools.partial(Trainer.training_step, trainer)
        # TRL's activation offloading begins anew with each training step, or frees nothing in later backwards.
        offloading = getattr(trainer, "maybe_activation_offload_context", nullcontext())
        with offloading, self._old_policy.repeating(resample, inputs, micro_batch.log_p):
            step(micro_batch.model, inputs, micro_batch.num_items_in_batch)

    def check(self, optimizer: Any, micro_batch: MicroBatch) -> None:
        """Compare the loss of ``micro_batch``, repeated at θ, with the recorded one. Costs one forward on every rank.

        Raises:
            RuntimeError: on some rank they differ; the second gradient would be another loss's. Raised on every rank.
        """
        losses: list[Tensor] = []
        held_step = getattr(optimizer, "held_step", None)
        with (
            self._prepared(optimizer) as done,
            torch.no_grad(),
            batch_norm_statistics_kept(optimizer._model),
            nullcontext() if held_step is None else held_step.repeated(),  # forwards restart the engine's timer
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", "None of the inputs have requires_grad=True")  # reentrant checkpointing
            accelerator: Any = self._trainer.accelerator
            done.callback(setattr, accelerator, "backward", accelerator.backward)
            accelerator.backward = lambda loss, **_: losses.append(loss)
            self._repeat(optimizer.resample, micro_batch, micro_batch.is_last)
        for module in micro_batch.model.modules():
            if isinstance(module, FSDPModule):  # its root keeps weights gathered for a backward, which does not come
                module.reshard()
        recorded, repeated = float(micro_batch.loss), float(losses[0])  # type: ignore[arg-type]
        # Equal but for kernels that add in no fixed order: a bf16 loss has three digits, and GRPO's cancels to about 0.
        equal = torch.isclose(torch.tensor(repeated), torch.tensor(recorded), rtol=1e-3, atol=1e-5, equal_nan=True)
        unequal = (~equal).float().to(losses[0].device)
        if accelerator.reduce(unequal, "sum") > 0:  # one rank that stopped alone would leave the others waiting for it
            raise RuntimeError(
                f"{type(self._trainer).__name__}: the first loss was {recorded!r}, and {repeated!r} when it was repeated at "
                f"the same weights{' (on another rank it was another one)' if equal else ''}. A second pass needs a loss "
                "that depends on weights, inputs and random numbers alone. Keep what it counts or averages in plain "
                "attributes of the trainer, which are put back for the second pass, or train without GradRegOptimizer."
            )
