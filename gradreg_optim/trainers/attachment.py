"""The tie to a trainer: the micro-batches that a Transformers or TRL trainer has just run become the closure.

A trainer calls ``optimizer.step()`` without a closure, after many micro-batches and its own gradient clipping. The
attachment therefore listens: ``optimizer.train()`` opens a micro-batch, ``compute_loss`` tells its *prepared* inputs and
random state, and ``accelerator.backward`` tells when the last gradient of the window is complete. At that moment, before
anything is clipped, the recorded micro-batches run once more at θ'.

Relied upon (transformers 4.57 to 5.23): ``Trainer.training_step`` calls ``optimizer.train()``, ``_prepare_inputs``,
``compute_loss`` and ``accelerator.backward`` in this order; ``accelerator.sync_gradients`` marks the last micro-batch of a
window, ``accelerator.gradient_state._set_sync_gradients`` sets it, as the Trainer itself does, and
``current_gradient_accumulation_steps`` is the number of micro-batches in a window. The tests of trainers fail when one of
these changes.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from gradreg_optim.core.step import Outcome
from gradreg_optim.drivers.further_passes import further_passes
from gradreg_optim.optimizer import GradRegOptimizer
from gradreg_optim.trainers.adoption import Adoption, find_wrapper
from gradreg_optim.trainers.generations import Generations, recorded_methods
from gradreg_optim.trainers.hooks import Hooks
from gradreg_optim.trainers.old_policy import METHOD, OldPolicy, clipped_by_loss, is_given
from gradreg_optim.trainers.recorder import Expected, MicroBatch, Recorder, not_repeatable
from gradreg_optim.trainers.replay import Replay


class Attachment:
    """Listens to one trainer: records its micro-batches, has them repeated at θ', and logs ``grad_reg/*``."""

    def __init__(self, trainer: Trainer, optimizer: GradRegOptimizer | None, settings: dict[str, Any]) -> None:
        self.trainer = trainer
        self.hooks = Hooks()
        self.recorder = Recorder(trainer)
        self._was_regularized = False
        self._is_checked = False
        self._logged: dict[str, list[Any]] = {}
        self._adoption = Adoption(trainer, optimizer, settings, self)
        self._generations = Generations(lambda: self.optimizer.storage().devices)
        self._old_policy = OldPolicy(trainer)
        self._repeats_whole_steps = bool(recorded_methods(trainer))
        self.replay = Replay(trainer, self._generations, self._old_policy, whole_steps=self._repeats_whole_steps)
        self._listen()

    def _listen(self) -> None:
        trainer, answer = self.trainer, self.hooks.answer
        answer(trainer, "compute_loss", self._compute_loss)
        answer(trainer, "_prepare_inputs", self._prepare_inputs)
        answer(trainer, "log", self._log)
        for owner, name in recorded_methods(trainer):
            answer(owner, name, self._generations)
        if self._repeats_whole_steps:
            answer(trainer, "training_step", self._training_step)
        if hasattr(trainer, METHOD):
            answer(trainer, METHOD, self._old_policy)
        answer(trainer.accelerator, "backward", self._backward)
        beginning = _Beginning(self)
        trainer.add_callback(beginning)
        self.hooks.call_on_undo(functools.partial(trainer.remove_callback, beginning))
        self.hooks.set(trainer, "_gradreg_attachment", self)

    @property
    def optimizer(self) -> Any:
        """The wrapper, ``None`` until the trainer has created an optimizer."""
        return self._adoption.optimizer

    @property
    def computes_in_low_precision(self) -> bool:
        """Whether the trainer's forward runs in half precision, whatever the weights are kept in."""
        return str(self.trainer.accelerator.mixed_precision) != "no"

    def detach(self) -> None:
        """Give the trainer its methods and its optimizer back."""
        self.release()
        self._adoption.give_back()

    def release(self) -> None:
        """Give the trainer its methods back; the wrapper stays its optimizer, and is free for another trainer."""
        self.hooks.undo()

    # The first pass.

    def begin_training(self) -> None:
        """Forget what an interrupted training left, and make sure that this one is regularized."""
        self.recorder.reset()
        self._logged.clear()
        self._was_regularized = self._is_checked = False
        if self._adoption.is_sharded:
            self._adoption.shard()
        if self._repeats_whole_steps and self._resample() != "reuse":
            raise self._old_policy.refusal(self._resample(), "its loss compares completions of one policy with each other")
        if find_wrapper(self.trainer.optimizer) is None:
            raise RuntimeError(
                "The trainer's optimizer is not the GradRegOptimizer that was attached any more: it would train without "
                "the penalty. Call detach(trainer), or give it a GradRegOptimizer."
            )

    def begin_micro_batch(self) -> None:
        """Called through ``optimizer.train()``: what follows is one ``compute_loss`` and one ``backward``."""
        if self.replay.is_running:
            return
        if not self.recorder.micro_batches:
            self.recorder.begin_window(self._plan(), self.optimizer.storage())
        self.recorder.begin_micro_batch()

    def _plan(self) -> Any:
        """The settings of the step to come; a schedule without a length rises over all of training."""
        groups, max_steps = self.optimizer.param_groups, self.trainer.state.max_steps
        if groups[0]["gradreg_schedule_steps"] is None and max_steps > 0:
            for group in groups:
                group["gradreg_schedule_steps"] = max(1, max_steps - groups[0]["gradreg_warmup_steps"])
        return self.optimizer.plan()

    def _compute_loss(
        self, compute_loss: Callable[..., Any], model: nn.Module, inputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        is_first_pass = not self.replay.is_running and torch.is_grad_enabled()  # evaluation runs without gradients
        log_p: list[Tensor] = []  # in warm-up as well, for the sake of the refusal
        if is_first_pass:
            self.recorder.check_loss()
            if self.recorder.expected is Expected.LOSS:
                log_p = self._record(
                    model, inputs, kwargs.get("num_items_in_batch", args[1] if len(args) > 1 else None)
                ).log_p
        if not is_first_pass or self._resample() == "reuse":
            return compute_loss(model, inputs, *args, **kwargs)
        with self._old_policy.keeping(self._resample(), inputs, log_p):
            return compute_loss(model, inputs, *args, **kwargs)

    def _record(self, model: nn.Module, inputs: Any, num_items_in_batch: Any) -> MicroBatch:
        return self.recorder.record(model, inputs, num_items_in_batch, self.optimizer.storage().devices)

    def _resample(self) -> str:
        return "reuse" if self.optimizer is None else str(self.optimizer.resample)

    def _training_step(
        self, training_step: Callable[..., Tensor], model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """Stands for ``optimizer.train()`` and ``compute_loss`` in trainers that call neither."""
        if not self.replay.is_running:
            self.begin_micro_batch()
            if self.recorder.expected is Expected.LOSS:
                self._generations.record(self._record(model, inputs, num_items_in_batch).generations)
        return training_step(model, inputs, num_items_in_batch)

    def _prepare_inputs(self, prepare: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return args[0] if self.replay.is_running else prepare(*args, **kwargs)

    def _backward(self, backward: Callable[..., Any], loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if self.replay.is_running:
            backward(loss, *args, **kwargs)
            return
        self.recorder.check_backward()
        is_recorded = self.recorder.expected is Expected.BACKWARD
        if is_recorded:
            self.recorder.micro_batches[-1].loss = loss.detach()
        run = functools.partial(backward, loss, *args, **kwargs)
        if self._adoption.is_sharded:
            self._backward_of_engine(run, is_recorded)
            return
        run()
        if is_recorded:
            self._after_backward()

    def _backward_of_engine(self, run: Callable[[], None], is_recorded: bool) -> None:
        """Accelerate takes the engine's step in backward: it is held back, and taken after the further passes."""
        gradient_state = self.trainer.accelerator.gradient_state
        split, is_last = self.recorder.split, gradient_state.sync_gradients
        with self.optimizer.held_step.held_back() as held:
            if is_recorded and split is not None and split.ends_after(len(self.recorder.micro_batches) - 1):
                gradient_state._set_sync_gradients(True)
            try:
                run()
            finally:
                gradient_state._set_sync_gradients(is_last)
        if is_recorded:
            self._after_backward()
        if held and is_last:
            self.optimizer.finish_window()

    def _after_backward(self) -> None:
        self._generations.record(None)
        self.recorder.close_micro_batch()
        if self.recorder.micro_batches[-1].is_last:
            try:
                self._regularize()
            finally:
                self.recorder.micro_batches.clear()

    # The further passes.

    def _regularize(self) -> None:
        """Replace the gradient of the window by the combined one."""
        start, recorder = time.perf_counter(), self.recorder
        if not self._is_checked:
            self._is_checked = True
            self.replay.check(self.optimizer, recorder.micro_batches[0])
        part, repeated = None, recorder.micro_batches
        if recorder.split is not None:
            part = recorder.split.joined()
            repeated = [repeated[position] for position in sorted(recorder.split.part)]

        def run() -> None:
            for micro_batch in self.replay.run(self.optimizer, repeated):
                self._note_ratios(micro_batch)

        self.optimizer.note(further_passes(recorder.storage, recorder.plan, run, part))
        self._note("second_pass_time", time.perf_counter() - start)
        self._was_regularized = True

    def check_consulted(self) -> None:
        """Called by the optimizer's step: raise if the window that ends here had no second pass; note its metrics."""
        plan = self._plan()
        if plan.regularizes and not self._was_regularized:
            raise not_repeatable(self.trainer, "the optimizer's step was reached without compute_loss and backward")
        if not plan.regularizes:
            self.optimizer.note(Outcome({"strength": 0.0}))
        self._was_regularized = False
        for name, value in self.optimizer.metrics.items():
            self._note(name, value)

    # The log.

    def _note_ratios(self, micro_batch: MicroBatch) -> None:
        """Note what a loss that has just run at θ' did with its ratio to the old policy, if it has one."""
        if hasattr(self.trainer, METHOD) or is_given(micro_batch.inputs):
            self._note("reweighted", float(bool(micro_batch.log_p) or is_given(micro_batch.inputs)))
        clipped = clipped_by_loss(self.trainer, micro_batch.counters)
        if clipped is not None:
            self._note("clipped_by_loss", clipped)

    def _note(self, name: str, value: Any) -> None:
        self._logged.setdefault(f"grad_reg/{name}", []).append(value)

    def _log(self, log: Callable[..., None], logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.replay.is_running:
            return
        if "loss" in logs:  # the figures of training; evaluation and the summary at the end have other keys
            for name, values in self._logged.items():
                counts_up = name == "grad_reg/skipped"
                logs[name] = float(values[-1]) if counts_up else sum(map(float, values)) / len(values)
            self._logged.clear()
        log(logs, *args, **kwargs)


class _Beginning(TrainerCallback):
    """Tells an attachment when its trainer begins to train."""

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment

    def on_train_begin(self, *_args: Any, **_kwargs: Any) -> None:
        self._attachment.begin_training()


def attachment_of(trainer: Trainer) -> Attachment | None:
    """What ties ``trainer`` to a wrapper, if it is tied."""
    return getattr(trainer, "_gradreg_attachment", None)
