"""Connects a wrapper to a Transformers or TRL trainer.

A trainer calls ``optimizer.step()`` without a closure, after several micro-batches and its own gradient
clipping. So an attachment replaces methods of the trainer. ``training_step`` begins a micro-batch,
``compute_loss`` gets its *prepared* inputs, and ``accelerator.backward`` completes its gradient. Then the
micro-batch runs once more at θ'; for the norm of the whole step, all recorded ones do after the last backward
of the window of gradient accumulation. Either is before the trainer clips.

Relied upon (transformers 4.57 to 5.23): ``Trainer.training_step`` calls ``_prepare_inputs``, ``compute_loss``
and ``accelerator.backward`` in this order; ``accelerator.sync_gradients`` marks the last micro-batch of a
window, and ``accelerator.gradient_state._set_sync_gradients`` sets it, as the Trainer itself does. The tests
of trainers fail when one of these changes.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from gradreg_optim.core.step import computed
from gradreg_optim.optimizer import GradRegOptimizer
from gradreg_optim.trainers.adoption import Adoption, find_wrapper
from gradreg_optim.trainers.generations import Generations
from gradreg_optim.trainers.micro_batches import MicroBatch, Window, not_repeatable
from gradreg_optim.trainers.old_policy import (
    LOG_P_METHOD,
    FirstPass,
    OldPolicy,
    clipped_by_loss,
    has_old_policy,
)
from gradreg_optim.trainers.patches import Patches
from gradreg_optim.trainers.trackers import tag_card, tell_trackers

REPEATED_IN = (1, 2, 10, 100)
"""The regularized steps of a training in which a loss is repeated at θ, besides those of checks."""


class Attachment(TrainerCallback):
    """Regularizes one trainer: records its micro-batches, repeats them at θ', and logs ``grad_reg/*``.

    Memory: the inputs of a micro-batch, or of the window. Time, besides the further passes: one forward of
    one micro-batch in the steps of :data:`REPEATED_IN` and of checks, to see whether the loss is still the
    same one when it is repeated.
    """

    def __init__(
        self, trainer: Trainer, optimizer: GradRegOptimizer | None, settings: dict[str, Any]
    ) -> None:
        self.trainer = trainer
        self.patches = Patches()
        self.window: Any = None  # of the step in progress
        self._reset()
        self.adoption = Adoption(trainer, optimizer, settings, self)
        self._generations = Generations(trainer, lambda: self.window.passes.storage.devices)
        self._old_policy = OldPolicy(trainer)
        answer = self.patches.answer
        answer(trainer, "training_step", self.training_step)
        answer(trainer, "compute_loss", self._compute_loss)
        answer(trainer, "log", self._log)
        answer(trainer, "create_model_card", tag_card)
        for owner, name in self._generations.methods:
            answer(owner, name, self._generations)
        if hasattr(trainer, LOG_P_METHOD):
            answer(trainer, LOG_P_METHOD, self._old_policy)
        trainer.add_callback(self)
        self.patches.callback(trainer.remove_callback, self)
        self.patches.set(trainer, "_gradreg_attachment", self)

    def _reset(self) -> None:
        if self.window is not None:
            self.window.passes.close()
        self.window = None
        self._regularized = 0  # steps of this training
        self._are_trackers_told = self._is_known_to_train = False
        self._steps_before: int | None = None
        self._logged: dict[str, list[Any]] = defaultdict(list)

    @property
    def optimizer(self) -> Any:
        """The wrapper, ``None`` until the trainer has created an optimizer."""
        return self.adoption.optimizer

    def is_outdated(self, wrapper: GradRegOptimizer) -> bool:
        """Whether the trainer was given ``wrapper`` in place of the one that is attached."""
        return wrapper is not self.optimizer and not self.adoption.is_sharded

    # The training.

    def on_train_begin(self, *_args: Any, **_kwargs: Any) -> None:
        """Forget an interrupted training, and check that this one can be regularized."""
        self._reset()
        if self.adoption.is_sharded:
            self.adoption.shard()
        if find_wrapper(self.trainer.optimizer) is None:
            raise RuntimeError(
                "The trainer's optimizer is not the GradRegOptimizer that was attached any more: it would "
                "train without the penalty. Call detach(trainer), or give the trainer a GradRegOptimizer."
            )
        if self._generations.methods:
            why = "its loss compares completions of one policy with each other"
            self._old_policy.refuse(self.optimizer.resample, why)

    def on_step_begin(self, *_args: Any, **_kwargs: Any) -> None:
        """Remember how many steps the wrapper has taken."""
        self._steps_before = None if self.optimizer is None else self.optimizer.step_count

    def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
        """Check that the trainer's step was the wrapper's, which checks that a second pass was taken."""
        before, self._steps_before = self._steps_before, None
        if before == self.optimizer.step_count and not self.trainer.accelerator.optimizer_step_was_skipped:
            raise RuntimeError(
                f"{type(self.trainer).__name__} took a step that was not its GradRegOptimizer's: it trains "
                "without the penalty. Let it call step() of the optimizer that it was given, or call "
                "detach(trainer)."
            )

    # The first pass.

    def training_step(self, step: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Run ``step``, the trainer's own, as one micro-batch."""
        trainer = self.trainer
        if self.window is not None and self.window.is_repeating:
            return step(*args, **kwargs)
        wrapper = find_wrapper(trainer.optimizer)
        if wrapper is not None and self.is_outdated(wrapper):
            self.patches.close()
            return Attachment(trainer, wrapper, {}).training_step(step, *args, **kwargs)
        if not self._are_trackers_told:  # which are set up by now
            self._are_trackers_told = True
            tell_trackers(trainer, self.optimizer)
        if (
            self.window is None or self.window.is_complete
        ):  # a scaler may have skipped the step of the last one
            self.window = self._new_window()
        self.window.begin_micro_batch()
        if self._generations.methods:  # this trainer does not call compute_loss
            micro_batch = self.window.record(*args, **kwargs)
            self._generations.recorded = None if micro_batch is None else micro_batch.generations
        # Only as long as the step runs: a search for hyperparameters makes a new accelerator for each trial.
        with (
            self.window.closed_by_errors(),
            self.window.refusing_other_backwards(),
            Patches().answer(trainer.accelerator, "backward", self._backward),
        ):
            return step(*args, **kwargs)

    def _new_window(self) -> Window:
        """Begin a step of the optimizer. A schedule without a length rises over all of training."""
        groups, max_steps = self.optimizer.param_groups, self.trainer.state.max_steps
        if groups[0]["gradreg_schedule_steps"] is None and max_steps > 0:
            for group in groups:
                group["gradreg_schedule_steps"] = max(1, max_steps - groups[0]["gradreg_warmup_steps"])
        if 0 < max_steps <= groups[0]["gradreg_warmup_steps"]:
            self.optimizer.witnesses.tell(
                "warmup",
                f"warmup_steps={groups[0]['gradreg_warmup_steps']}, and {max_steps} steps of training: none "
                "has the penalty",
                "a warm-up for a longer training",
                "lower warmup_steps",
            )
        return Window(self.trainer, self.optimizer, self._generations, self._old_policy)

    def _compute_loss(
        self, compute_loss: Callable[..., Any], model: Any, inputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        window = self.window
        if window is None or window.is_repeating or not torch.is_grad_enabled():  # as in evaluation
            return compute_loss(model, inputs, *args, **kwargs)
        num_items_in_batch = kwargs.get("num_items_in_batch", args[1] if len(args) > 1 else None)
        micro_batch = window.record(model, inputs, num_items_in_batch)
        first = FirstPass() if micro_batch is None else micro_batch.first
        # In the warm-up too, since ``keeping`` refuses losses without a ratio.
        with self._old_policy.keeping(self.optimizer.resample, inputs, first), window.allowing_backwards():
            return compute_loss(model, inputs, *args, **kwargs)

    def _backward(self, backward: Callable[..., Any], loss: Tensor, *args: Any, **kwargs: Any) -> None:
        window: Any = self.window
        noted = window.passes.losses.noted() if window.regularizes else nullcontext()
        if window.is_repeating:
            with noted, window.reduced_by_engine():
                backward(loss, *args, **kwargs)
            return
        window.record_loss(loss)
        # Accelerate takes a DeepSpeed engine's step inside backward; it has to wait for the further passes.
        holding = self.optimizer.held_step.held_back() if self.adoption.is_sharded else nullcontext()
        with window.allowing_backwards():
            with holding as held, noted, window.reduced_by_engine():
                backward(loss, *args, **kwargs)
            window.end_micro_batch()
            self._generations.recorded = None
            if window.is_due:
                self._regularize(window)
            if window.is_complete and held:
                self.optimizer.finish_window()

    # The further passes.

    def _regularize(self, window: Window) -> None:
        """Replace the gradient of the window by the combined one."""
        start = time.perf_counter()
        try:
            with closing(window.passes) as passes:  # after an exception the weights are at θ
                self.optimizer._module_state.end()
                passes.storage.check_first_pass()  # a repeated loss would differ, too, and not say why
                if window.begun == 1 or not window.is_apart:
                    self._compare_losses(window)
                for micro_batch in window.further_passes():
                    self._note_ratios(micro_batch)
        finally:
            window.micro_batches.clear()
        self._note("second_pass_time", time.perf_counter() - start)

    def _compare_losses(self, window: Window) -> None:
        """Repeat the first loss of the window. In the first step a difference raises, later it warns."""
        self._regularized += 1
        plan = window.passes.plan
        if self._regularized not in REPEATED_IN and not plan.is_checked:
            return
        found = window.compare_losses()
        name = type(self.trainer).__name__
        if found is not None and self._regularized == 1:
            raise RuntimeError(
                f"{name}: the first loss was {found}. The second pass needs a loss that depends on weights, "
                "inputs and random numbers alone. Keep state of the loss in plain attributes of the "
                "trainer, which are restored for the second pass, or train without GradRegOptimizer."
            )
        if found is not None:
            self.optimizer.witnesses.tell(
                "repeated",
                f"in regularized step {self._regularized} of {name} the first loss was {found}",
                "a loss that changes state outside of the trainer's attributes (an object without "
                "update(), a class, a closure, a list in a module); batches or masks from an iterator or a "
                "generator of its own",
                "keep such state in plain attributes or containers of the trainer, or change it in a "
                "callback",
            )

    def check_consulted(self) -> None:
        """Called by the optimizer's step: raise if a second pass is missing, and collect the metrics."""
        window, self.window = self.window or self._new_window(), None
        if window.regularizes and not window.is_regularized:
            window.passes.close()
            raise not_repeatable(
                self.trainer, "the optimizer's step was reached without compute_loss and backward"
            )
        for _ in window.passes:  # to its end, which notes a step without penalty
            pass
        if not self._is_known_to_train:
            self._is_known_to_train = True
            self.adoption.check_trains()
        for name, value in self.optimizer.figures().items():
            self._note(name, value)

    # The log.

    def _note_ratios(self, micro_batch: MicroBatch) -> None:
        """Collect whether the loss that just ran reweighted completions, and which fraction it clipped."""
        is_given = has_old_policy(micro_batch.inputs)
        if is_given or hasattr(self.trainer, LOG_P_METHOD):
            self._note("reweighted", float(is_given or micro_batch.first.log_p is not None))
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
            self.optimizer.witnesses.look()  # at figures that have been read just now
        log(logs, *args, **kwargs)


def attachment_of(trainer: Trainer) -> Attachment | None:
    """Return the attachment of ``trainer``; ``None`` if it has none."""
    return getattr(trainer, "_gradreg_attachment", None)
