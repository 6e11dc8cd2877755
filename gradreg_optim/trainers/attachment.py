"""Connects a wrapper to a Transformers or TRL trainer.

A trainer calls ``optimizer.step()`` without a closure, after several micro-batches and its own gradient clipping. Hooks
record each micro-batch: ``optimizer.train()`` begins it, ``compute_loss`` gets its *prepared* inputs, and
``accelerator.backward`` completes its gradient. After the last backward of the window of gradient accumulation, before
the trainer clips, the recorded micro-batches run once more at θ'.

Relied upon (transformers 4.57 to 5.23): ``Trainer.training_step`` calls ``optimizer.train()``, ``_prepare_inputs``,
``compute_loss`` and ``accelerator.backward`` in this order; ``accelerator.sync_gradients`` marks the last micro-batch of a
window, ``accelerator.gradient_state._set_sync_gradients`` sets it, as the Trainer itself does, and
``current_gradient_accumulation_steps`` is the number of micro-batches in a window. The tests of trainers fail when one of
these changes.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from gradreg_optim.core.regularize import regularized
from gradreg_optim.core.step import Outcome, computed
from gradreg_optim.drivers.micro_batches import further_passes
from gradreg_optim.optimizer import GradRegOptimizer
from gradreg_optim.trainers.adoption import Adoption, find_wrapper
from gradreg_optim.trainers.generations import Generations
from gradreg_optim.trainers.hooks import Hooks
from gradreg_optim.trainers.old_policy import LOG_P_METHOD, OldPolicy, clipped_by_loss, has_old_policy
from gradreg_optim.trainers.other_backwards import OtherBackwards
from gradreg_optim.trainers.record import tag_card, tell_trackers
from gradreg_optim.trainers.recorder import MicroBatch, Recorder, not_repeatable
from gradreg_optim.trainers.replay import Replay


class Attachment(TrainerCallback):
    """Hooks into one trainer: records its micro-batches, repeats them at θ', and logs ``grad_reg/*``.

    Memory: the inputs of the window. Time, besides the further passes: one forward in each training, which checks that the
    loss can be repeated.
    """

    def __init__(self, trainer: Trainer, optimizer: GradRegOptimizer | None, settings: dict[str, Any]) -> None:
        self.trainer = trainer
        self.hooks = Hooks()
        self._reset()
        self.adoption = Adoption(trainer, optimizer, settings, self)
        self._generations = Generations(trainer, lambda: self.recorder.storage.devices)
        self._old_policy = OldPolicy(trainer)
        self._other_backwards = OtherBackwards(trainer, lambda: self.optimizer if self._plan().regularizes else None)
        self.replay = Replay(trainer, self._generations, self._old_policy)
        answer = self.hooks.answer
        answer(trainer, "compute_loss", self._compute_loss)
        answer(trainer, "log", self._log)
        answer(trainer, "create_model_card", tag_card)
        for owner, name in self._generations.methods:
            answer(owner, name, self._generations)
        answer(trainer, "training_step", self._training_step)
        if hasattr(trainer, LOG_P_METHOD):
            answer(trainer, LOG_P_METHOD, self._old_policy)
        answer(trainer.accelerator, "backward", self._backward)
        trainer.add_callback(self)
        self.hooks.callback(trainer.remove_callback, self)
        self.hooks.set(trainer, "_gradreg_attachment", self)

    def _reset(self) -> None:
        self.recorder = Recorder(self.trainer)
        self._was_regularized = self._is_checked = self._is_known_to_train = False
        self._steps_before: int | None = None
        self._logged: dict[str, list[Any]] = defaultdict(list)

    @property
    def optimizer(self) -> Any:
        """The wrapper, ``None`` until the trainer has created an optimizer."""
        return self.adoption.optimizer

    @property
    def low_dtype(self) -> torch.dtype | None:
        """The dtype of the trainer's forward if that is half precision, in whatever dtype the weights are kept."""
        return {"no": None, "fp16": torch.float16}.get(str(self.trainer.accelerator.mixed_precision), torch.bfloat16)

    @property
    def _resample(self) -> str:
        return getattr(self.optimizer, "resample", "reuse")

    # The first pass.

    def on_train_begin(self, *_args: Any, **_kwargs: Any) -> None:
        """Forget an interrupted training, and check that this one can be regularized."""
        self._reset()
        if self.adoption.is_sharded:
            self.adoption.shard()
        if self._generations.methods and self._resample != "reuse":
            raise self._old_policy.refusal(self._resample, "its loss compares completions of one policy with each other")
        if find_wrapper(self.trainer.optimizer) is None:
            raise RuntimeError(
                "The trainer's optimizer is not the GradRegOptimizer that was attached any more: it would train without "
                "the penalty. Call detach(trainer), or give the trainer a GradRegOptimizer."
            )

    def on_step_begin(self, *_args: Any, **_kwargs: Any) -> None:
        """Remember how many steps the wrapper has taken."""
        self._steps_before = None if self.optimizer is None else self.optimizer.step_count

    def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
        """Check that the trainer's step was the wrapper's, which checks that a second pass was taken."""
        before, self._steps_before = self._steps_before, None
        if before == self.optimizer.step_count and not self.trainer.accelerator.optimizer_step_was_skipped:
            raise RuntimeError(
                f"{type(self.trainer).__name__} took a step that was not its GradRegOptimizer's: it trains without the "
                "penalty. Let it call step() of the optimizer that it was given, or call detach(trainer)."
            )

    def begin_micro_batch(self) -> None:
        """Expect one ``compute_loss`` and one ``backward``. Called through ``optimizer.train()``."""
        if self.replay.is_running:
            return
        if not self.recorder.micro_batches:  # the window begins
            if self.recorder.plan is None:  # the first of this training: its trackers are set up
                tell_trackers(self.trainer, self.optimizer)
            self.recorder = Recorder(self.trainer, self._plan(), self.optimizer.storage(), self.optimizer._buffers)
        self.recorder.begin_micro_batch()

    def _plan(self) -> Any:
        """Return the plan of the next step. A schedule without a length rises over all of training."""
        groups, max_steps = self.optimizer.param_groups, self.trainer.state.max_steps
        if groups[0]["gradreg_schedule_steps"] is None and max_steps > 0:
            for group in groups:
                group["gradreg_schedule_steps"] = max(1, max_steps - groups[0]["gradreg_warmup_steps"])
        return self.optimizer.plan()

    def _compute_loss(self, compute_loss: Callable[..., Any], model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.replay.is_running or not torch.is_grad_enabled():  # evaluation runs without gradients
            return compute_loss(model, inputs, *args, **kwargs)
        num_items_in_batch = kwargs.get("num_items_in_batch", args[1] if len(args) > 1 else None)
        micro_batch = self.recorder.record(model, inputs, num_items_in_batch)
        kept = [] if micro_batch is None else micro_batch.log_p
        # In the warm-up too, since ``keeping`` refuses losses without a ratio.
        with self._old_policy.keeping(self._resample, inputs, kept), self._other_backwards.allowed():
            return compute_loss(model, inputs, *args, **kwargs)

    def _training_step(self, training_step: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Record a micro-batch here if the trainer calls neither ``optimizer.train()`` nor ``compute_loss``."""
        if self.replay.is_running:
            return training_step(*args, **kwargs)
        if self._generations.methods:
            self.begin_micro_batch()
            micro_batch = self.recorder.record(*args, **kwargs)
            self._generations.recorded = None if micro_batch is None else micro_batch.generations
        with self._other_backwards.refused():
            return training_step(*args, **kwargs)

    def _backward(self, backward: Callable[..., Any], loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if self.replay.is_running:
            backward(loss, *args, **kwargs)
            return
        with self._other_backwards.allowed():
            self._backward_and_regularize(backward, loss, *args, **kwargs)

    def _backward_and_regularize(self, backward: Callable[..., Any], loss: Tensor, *args: Any, **kwargs: Any) -> None:
        is_recorded = self.recorder.record_loss(loss)
        with self._engine_step_held() if self.adoption.is_sharded else nullcontext() as held:
            backward(loss, *args, **kwargs)
        if is_recorded:
            self._generations.recorded = None
            self.recorder.close_micro_batch()
            if self.recorder.micro_batches[-1].is_last:
                try:
                    self._regularize()
                finally:
                    self.recorder.micro_batches.clear()
        if held and self.trainer.accelerator.sync_gradients:
            self.optimizer.finish_window()

    @contextmanager
    def _engine_step_held(self) -> Iterator[list[Callable[[], Any]]]:
        """Hold the step of a DeepSpeed engine back, which Accelerate takes inside backward, until the further passes ran."""
        gradient_state = self.trainer.accelerator.gradient_state
        is_last = gradient_state.sync_gradients
        with self.optimizer.held_step.held_back() as held:
            gradient_state._set_sync_gradients(is_last or self.recorder.is_summed)
            try:
                yield held
            finally:
                gradient_state._set_sync_gradients(is_last)

    # The further passes.

    def _regularize(self) -> None:
        """Replace the gradient of the window by the combined one."""
        start, recorder = time.perf_counter(), self.recorder
        recorder.buffers.end()
        recorder.storage.check_first_pass()  # before a loss is repeated, which would differ without saying why
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

        with closing(regularized(recorder.storage, recorder.plan)) as points:
            next(points)
            self.optimizer.note(further_passes(points, part, run))
        self._note("second_pass_time", time.perf_counter() - start)
        self._was_regularized = True

    def check_consulted(self) -> None:
        """Collect the metrics of a step. Called by the optimizer's step; raises if a second pass was due and did not run."""
        plan = self._plan()
        if plan.regularizes and not self._was_regularized:
            raise not_repeatable(self.trainer, "the optimizer's step was reached without compute_loss and backward")
        if not plan.regularizes:
            self.optimizer.note(Outcome({"strength": 0.0}))
        self._was_regularized = False
        if not self._is_known_to_train:
            self._is_known_to_train = True
            self.adoption.check_trains()
        for name, value in self.optimizer.figures().items():
            self._note(name, value)

    # The log.

    def _note_ratios(self, micro_batch: MicroBatch) -> None:
        """Collect whether the loss that just ran at θ' reweighted its completions, and which fraction it clipped."""
        is_given = has_old_policy(micro_batch.inputs)
        if is_given or hasattr(self.trainer, LOG_P_METHOD):
            self._note("reweighted", float(is_given or bool(micro_batch.log_p)))
        clipped = clipped_by_loss(self.trainer, micro_batch.clipped_before)
        if clipped is not None:
            self._note("clipped_by_loss", clipped)

    def _note(self, name: str, value: Any) -> None:
        self._logged[f"grad_reg/{name}"].append(value)

    def _log(self, log: Callable[..., None], logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:  # the figures of training; evaluation and the summary at the end have other keys
            for name, values in self._logged.items():
                counts_up = name == "grad_reg/skipped"
                figures = [float(computed(value)) for value in (values[-1:] if counts_up else values)]
                logs[name] = sum(figures) / len(figures)
            self._logged.clear()
            self.optimizer.advice.look_at_ratios()  # which have been read just now
        log(logs, *args, **kwargs)


def attachment_of(trainer: Trainer) -> Attachment | None:
    """Return the attachment of ``trainer``; ``None`` if it has none."""
    return getattr(trainer, "_gradreg_attachment", None)
