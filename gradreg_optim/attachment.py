"""The tie to a trainer: the micro-batches that a Transformers or TRL trainer has just run become the closure.

A trainer calls ``optimizer.step()`` without a closure, after many micro-batches and its own gradient clipping. The
attachment therefore listens: ``optimizer.train()`` opens a micro-batch, ``compute_loss`` tells its *prepared* inputs and
random state, and ``accelerator.backward`` tells when the last gradient of the window is complete. At that moment, before
anything is clipped, the recorded micro-batches run once more at θ' through the Trainer's own ``training_step``, which
scales the loss as the installed version does. Nothing is generated or scored again, and whatever the second pass counts or
logs on the trainer is dropped.

Relied upon (transformers 4.57 to 5.23): ``Trainer.training_step`` calls ``optimizer.train()``, ``_prepare_inputs``,
``compute_loss`` and ``accelerator.backward`` in this order; ``accelerator.sync_gradients`` marks the last micro-batch of a
window, ``accelerator.gradient_state._set_sync_gradients`` sets it, as the Trainer itself does, and
``current_gradient_accumulation_steps`` is the number of micro-batches in a window. The tests of trainers fail when one of
these changes.
"""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback

from gradreg_optim.exclusion import default_exclusion
from gradreg_optim.fraction import SplitGradient
from gradreg_optim.optimizer import GradRegOptimizer
from gradreg_optim.perturbation import RandomState, batch_norm_statistics_kept
from gradreg_optim.resample import METHOD, OldPolicy, clipped_by_loss, is_given
from gradreg_optim.snapshot import copied, counters, untouched
from gradreg_optim.whole_steps import Answer, Answers, answered_methods
from gradreg_optim.written_out import written_out

__all__ = ["Attachment", "attachment_of", "find_wrapper"]


def find_wrapper(optimizer: Any) -> GradRegOptimizer | None:
    """The :class:`GradRegOptimizer` in a chain of wrappers (Accelerate's, an engine's), or ``None``."""
    while optimizer is not None and not isinstance(optimizer, GradRegOptimizer):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


@dataclass
class MicroBatch:
    """What the first pass over a micro-batch started from."""

    model: nn.Module
    inputs: Any
    num_items_in_batch: Any
    random: RandomState
    counters: dict[str, Any]
    is_last: bool
    loss: Tensor | None = None
    answers: list[Answer] = field(default_factory=list)
    old: list[Tensor] = field(default_factory=list)


class Attachment:
    """The tie between one trainer and one wrapper: records micro-batches, repeats them at θ', logs ``grad_reg/*``."""

    def __init__(self, trainer: Trainer, optimizer: GradRegOptimizer | None, settings: dict[str, Any]) -> None:
        self.trainer = trainer
        self._is_sharded = trainer.accelerator.distributed_type == DistributedType.DEEPSPEED
        self._excluded: list[Tensor] = []
        self.optimizer: Any = None  # until the trainer has created it
        self._settings = settings
        self._groups_before: list[dict[str, Any]] = []
        self._undo: list[Callable[[], None]] = []
        self._micro_batches: list[MicroBatch] = []
        self._split: SplitGradient | None = None
        self._awaits: str | None = None
        self._replaying = False
        self._consulted = False
        self._is_checked = False
        self._logged: dict[str, list[Any]] = {}
        if optimizer is not None:
            self._adopt(optimizer)
        else:
            if trainer.optimizer is not None:
                self._wrap()
        self._given = self.optimizer
        if optimizer is None or self._is_sharded:  # under DeepSpeed, Transformers forgets the optimizer that it was given
            self._listen(trainer, "create_optimizer", self._create_optimizer)
        self._listen(trainer, "compute_loss", self._compute_loss)
        self._listen(trainer, "_prepare_inputs", self._prepare_inputs)
        self._listen(trainer, "log", self._log)
        self._answers = Answers(lambda: self.optimizer._devices())
        self._repeats_whole_steps = bool(answered_methods(trainer))
        for owner, name in answered_methods(trainer):
            self._listen(owner, name, self._answers)
        if self._repeats_whole_steps:
            self._listen(trainer, "training_step", self._training_step)
        self._old_policy = OldPolicy(trainer)
        if hasattr(trainer, METHOD):
            self._listen(trainer, METHOD, self._old_policy)
        self._listen(trainer.accelerator, "backward", self._backward)
        beginning = _Beginning(self)
        trainer.add_callback(beginning)
        self._undo.append(functools.partial(trainer.remove_callback, beginning))
        trainer._gradreg_attachment = self  # type: ignore[attr-defined]
        self._undo.append(functools.partial(delattr, trainer, "_gradreg_attachment"))

    @property
    def computes_in_low_precision(self) -> bool:
        """Whether the trainer's forward runs in half precision, whatever the weights are kept in."""
        return str(self.trainer.accelerator.mixed_precision) != "no"

    def detach(self) -> None:
        """Give the trainer its methods and its optimizer back."""
        self.release()
        holder: Any = self.trainer
        while holder is not None and (inner := getattr(holder, "optimizer", None)) is not self.optimizer:
            holder = inner
        if self.optimizer is not None and holder is not None:
            _exchange(holder, self.optimizer.optimizer)
            self._restore(self.optimizer.param_groups)

    def release(self) -> None:
        """Give the trainer its methods back, and the wrapper, which stays its optimizer, its freedom."""
        while self._undo:
            self._undo.pop()()

    # Making the wrapper the trainer's.

    def _create_optimizer(self, create: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._is_sharded and self._given is not None and self.trainer.optimizer is None:
            if self.optimizer is not self._given:
                raise RuntimeError(
                    "Under DeepSpeed an optimizer that was given as optimizers= trains once: its parameters are partitions "
                    "now. Build a new trainer, or let the trainer create the optimizer and call attach(trainer)."
                )
            self.trainer.optimizer = self._given
        create(*args, **kwargs)
        if find_wrapper(self.trainer.optimizer) is None and isinstance(self.trainer.optimizer, Optimizer):
            self._wrap()
        return self.trainer.optimizer

    def _shard(self) -> None:
        """Continue on the partitions of the engine that now holds the optimizer."""
        from gradreg_optim.zero import ZeroGradRegOptimizer  # nothing else here needs DeepSpeed

        engine: Any = self.trainer.model_wrapped
        wrapper = self.optimizer
        if wrapper is engine.optimizer.optimizer and isinstance(wrapper, ZeroGradRegOptimizer):
            return
        if wrapper is None and not self._settings.get("exclude"):  # the optimizer comes from DeepSpeed's configuration
            self._excluded = list(default_exclusion(self.trainer.model))
        self._tie(ZeroGradRegOptimizer.taking_over(engine, wrapper, self._settings, self._excluded))

    def _wrap(self) -> None:
        holder: Any = self.trainer
        while isinstance(holder.optimizer, AcceleratedOptimizer):  # from an earlier training
            holder = holder.optimizer
        groups = holder.optimizer.param_groups
        self._groups_before = [{key: group[key] for key in group if key.startswith("gradreg_")} for group in groups]
        try:
            optimizer = GradRegOptimizer(holder.optimizer, **{"model": self.trainer.model, **self._settings})
            self._adopt(optimizer)
        except BaseException:
            self._restore(groups)
            raise
        _exchange(holder, optimizer)

    def _restore(self, groups: list[dict[str, Any]]) -> None:
        """Take out of ``groups`` what wrapping put there; a wrapper that the trainer was given keeps its own settings."""
        for group, before in zip(groups, self._groups_before, strict=False):
            for key in [key for key in group if key.startswith("gradreg_")]:
                del group[key]
            group.update(before)

    def _adopt(self, optimizer: GradRegOptimizer) -> None:
        optimizer.leave_out([] if optimizer.exclude else default_exclusion(self.trainer.model))
        self._excluded = [group["params"][i] for group in optimizer.param_groups for i in group["gradreg_excluded"]]
        self._tie(optimizer)

    def _tie(self, optimizer: GradRegOptimizer) -> None:
        if optimizer._attachment is not None:  # to another trainer, which gets it back when it trains again
            optimizer._attachment.release()
        model = self.trainer.model if optimizer._model is None else optimizer._model
        for name, value in (("_model", model), ("_scaler", self.trainer.accelerator.scaler), ("_attachment", self)):
            self._undo.append(functools.partial(setattr, optimizer, name, getattr(optimizer, name)))
            setattr(optimizer, name, value)
        self.optimizer = optimizer

    def _listen(self, owner: Any, name: str, listener: Callable[..., Any]) -> None:
        """Let ``listener(original, ...)`` answer calls of ``owner.name``."""
        original = getattr(owner, name)
        replaced = vars(owner).get(name)

        @functools.wraps(original)
        def method(*args: Any, **kwargs: Any) -> Any:
            return listener(original, *args, **kwargs)

        setattr(owner, name, method)
        restore = functools.partial(setattr, owner, name, replaced) if replaced else functools.partial(delattr, owner, name)
        self._undo.append(restore)

    # Listening to the first pass.

    def begin_training(self) -> None:
        """Forget what an interrupted training left, and make sure that this one is regularized."""
        self._micro_batches.clear()
        self._logged.clear()
        self._awaits, self._consulted, self._is_checked = None, False, False
        if self._is_sharded:
            self._shard()
        if self._repeats_whole_steps and self._resample() != "reuse":
            raise self._old_policy.refusal(self._resample(), "its loss compares completions of one policy with each other")
        if find_wrapper(self.trainer.optimizer) is None:
            raise RuntimeError(
                "The trainer's optimizer is not the GradRegOptimizer that was attached any more: it would train without "
                "the penalty. Call detach(trainer), or give it a GradRegOptimizer."
            )

    def begin_micro_batch(self) -> None:
        """Called through ``optimizer.train()``: what follows is one ``compute_loss`` and one ``backward``."""
        if not self._replaying:
            self._awaits = "compute_loss" if self._regularizes() else None
            if self._awaits is not None:
                self._begin_split()

    def _begin_split(self) -> None:
        """With ``fraction``, see to it that the gradient is reduced over ranks wherever the part begins or ends."""
        if not self._micro_batches:
            self._split = self._new_split()
        if self._split is not None and self._split.ends_after(len(self._micro_batches)):
            model: Any = self.trainer.model_wrapped
            if isinstance(model, DistributedDataParallel):  # inside its no_sync(), which puts this back
                model.require_backward_grad_sync = True
            elif isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(True)

    def _new_split(self) -> SplitGradient | None:
        fraction = self.optimizer.param_groups[0]["gradreg_fraction"]
        if fraction == 1:
            return None
        if self.trainer.args.gradient_accumulation_steps == 1:
            raise ValueError(
                f"fraction={fraction!r} takes the difference on some of a step's micro-batches, and there is one "
                "(gradient_accumulation_steps=1). Accumulate more, and make per_device_train_batch_size smaller by as much; "
                "or leave fraction at 1."
            )
        return SplitGradient(self.optimizer, self.trainer.current_gradient_accumulation_steps)

    def _compute_loss(
        self, compute_loss: Callable[..., Any], model: nn.Module, inputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        listening = not self._replaying and torch.is_grad_enabled()  # evaluation runs without gradients
        if listening and self._awaits == "backward":
            raise RuntimeError(self._not_repeatable("compute_loss was called twice in one micro-batch"))
        if listening and self._awaits == "compute_loss":
            self._record(model, inputs, kwargs.get("num_items_in_batch", args[1] if len(args) > 1 else None))
        if not listening or self._resample() == "reuse":
            return compute_loss(model, inputs, *args, **kwargs)
        kept = self._micro_batches[-1].old if self._awaits == "backward" else []  # in warm-up, for the sake of the refusal
        with self._old_policy.keeping(self._resample(), inputs, kept):
            return compute_loss(model, inputs, *args, **kwargs)

    def _resample(self) -> str:
        return "reuse" if self.optimizer is None else str(self.optimizer.resample)

    def _training_step(
        self, training_step: Callable[..., Tensor], model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """Stands for ``optimizer.train()`` and ``compute_loss`` in trainers that call neither."""
        if not self._replaying:
            self.begin_micro_batch()
            if self._awaits is not None:
                self._record(model, inputs, num_items_in_batch)
                self._answers.record(self._micro_batches[-1].answers)
        return training_step(model, inputs, num_items_in_batch)

    def _record(self, model: nn.Module, inputs: Any, num_items_in_batch: Any) -> None:
        self._awaits = "backward"
        self._micro_batches.append(
            MicroBatch(
                model=model,
                inputs=copied(inputs),
                num_items_in_batch=num_items_in_batch,
                random=RandomState(self.optimizer._devices()),
                counters=counters(vars(self.trainer)),
                is_last=self.trainer.accelerator.sync_gradients,
            )
        )

    def _backward(self, backward: Callable[..., Any], loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if not self._replaying and self._awaits in ("compute_loss", "train"):
            raise RuntimeError(self._not_repeatable("accelerator.backward got a loss that is not compute_loss's"))
        if not self._replaying and self._awaits == "backward":
            self._micro_batches[-1].loss = loss.detach()
        if not self._is_sharded or self._replaying:
            backward(loss, *args, **kwargs)
            self._after_backward()
            return
        gradient_state = self.trainer.accelerator.gradient_state
        is_last = gradient_state.sync_gradients
        is_split_here = self._awaits == "backward" and self._split is not None
        with self.optimizer.held_back() as held:  # Accelerate takes the engine's step in backward
            if is_split_here and self._split.ends_after(len(self._micro_batches) - 1):  # type: ignore[union-attr]
                gradient_state._set_sync_gradients(True)
            try:
                backward(loss, *args, **kwargs)
            finally:
                gradient_state._set_sync_gradients(is_last)
        self._after_backward()
        if held and is_last:
            self.optimizer.finish_window()

    def _after_backward(self) -> None:
        if self._replaying:
            return
        if self._awaits is None:
            if self.trainer.accelerator.sync_gradients and self.optimizer.reuses:
                self.optimizer.reuse_()
            return
        self._awaits = "train"
        self._answers.record(None)
        if self._split is not None:
            self._split.close(len(self._micro_batches) - 1)
        if self._micro_batches[-1].is_last:
            start = time.perf_counter()
            try:
                if not self._is_checked:
                    self._check_repetition()
                part = None
                if self._split is not None:
                    part = self._split.joined()
                    self._micro_batches = [self._micro_batches[position] for position in sorted(self._split.part)]
                self.optimizer.regularize_(self._replay, part)
            finally:
                self._micro_batches.clear()
            self._note("second_pass_time", time.perf_counter() - start)
            self._consulted = True

    def _prepare_inputs(self, prepare: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return args[0] if self._replaying else prepare(*args, **kwargs)

    def _regularizes(self) -> bool:
        groups, max_steps = self.optimizer.param_groups, self.trainer.state.max_steps
        if groups[0]["gradreg_schedule_steps"] is None and max_steps > 0:
            for group in groups:
                group["gradreg_schedule_steps"] = max(1, max_steps - groups[0]["gradreg_warmup_steps"])
        return bool(self.optimizer.regularizes)

    def _not_repeatable(self, what: str) -> str:
        return (
            f"{type(self.trainer).__name__}: {what}. A second pass repeats micro-batches of one compute_loss and one "
            "accelerator.backward each; with anything else the step would not be regularized, or wrongly. "
            "Call optimizer.step(closure) in a training loop of your own, or train without GradRegOptimizer."
        )

    # The second pass.

    def _replay(self) -> None:
        """Run the recorded micro-batches again, each from where it started."""
        with (
            self._replayed(),
            torch.enable_grad(),
            self.optimizer.second_window() if self._is_sharded else nullcontext(),
            self._written_out(),
        ):
            for micro_batch in self._micro_batches:
                is_last = micro_batch is self._micro_batches[-1]
                alone = is_last or self._is_sharded
                gathering = nullcontext() if alone else self.trainer.accelerator.no_sync(micro_batch.model)
                with gathering:
                    self._repeat(micro_batch, is_last)
                self._note_ratios(micro_batch)

    def _written_out(self) -> AbstractContextManager[None]:
        """For second derivatives, losses without fused kernels; they hold the old policy fixed, which has to be wanted."""
        if self.optimizer.param_groups[0]["gradreg_method"] != "exact":
            return nullcontext()
        resample = self.optimizer.resample
        recomputes = hasattr(self.trainer, METHOD) and not is_given(self._micro_batches[0].inputs)
        if resample == "sequence" or (resample == "reuse" and recomputes):
            raise RuntimeError(
                f"{type(self.trainer).__name__}: method='exact' differentiates the loss twice, with the policy that drew "
                f"the completions held fixed: that is not what resample={resample!r} measures. Pass resample='importance', "
                "or method='forward' or 'central'."
            )
        return written_out()

    @contextmanager
    def _replayed(self) -> Iterator[ExitStack]:
        """Let the block repeat micro-batches; afterwards trainer and random numbers are where they were."""
        gradient_state = self.trainer.accelerator.gradient_state
        with untouched(self.trainer), RandomState(self.optimizer._devices()).replayed(), ExitStack() as done:
            self._replaying = True
            done.callback(setattr, self, "_replaying", False)
            done.callback(self._answers.record, None)
            done.callback(gradient_state._set_sync_gradients, gradient_state.sync_gradients)
            yield done

    def _repeat(self, micro_batch: MicroBatch, is_last: bool) -> None:
        """Run one micro-batch through the Trainer's own training step, or a whole step of the trainer, where it started."""
        trainer, inputs = self.trainer, copied(micro_batch.inputs)
        vars(trainer).update(counters(micro_batch.counters))
        micro_batch.random.restore()
        trainer.accelerator.gradient_state._set_sync_gradients(is_last)
        self._answers.repeat(micro_batch.answers)
        step = trainer.training_step if self._repeats_whole_steps else functools.partial(Trainer.training_step, trainer)
        # TRL's activation offloading begins anew with each training step, or frees nothing in later backwards.
        offloading = getattr(trainer, "maybe_activation_offload_context", nullcontext())
        with offloading, self._old_policy.repeating(self._resample(), inputs, micro_batch.old):
            step(micro_batch.model, inputs, micro_batch.num_items_in_batch)

    def _check_repetition(self) -> None:
        """Once in each training: the first loss, repeated at θ, is the recorded one. Costs one forward on every rank.

        Raises:
            RuntimeError: on some rank it is not; the second gradient would be another loss's. Raised on every rank.
        """
        micro_batch, self._is_checked = self._micro_batches[0], True
        losses: list[Tensor] = []
        with (
            self._replayed() as done,
            torch.no_grad(),
            batch_norm_statistics_kept(self.optimizer._model),
            self.optimizer.second_window() if self._is_sharded else nullcontext(),  # forwards restart the engine's timer
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", "None of the inputs have requires_grad=True")  # reentrant checkpointing
            accelerator: Any = self.trainer.accelerator
            done.callback(setattr, accelerator, "backward", accelerator.backward)
            accelerator.backward = lambda loss, **_: losses.append(loss)
            self._repeat(micro_batch, micro_batch.is_last)
        for module in micro_batch.model.modules():
            if isinstance(module, FSDPModule):  # its root keeps weights gathered for a backward, which does not come
                module.reshard()
        recorded, repeated = float(micro_batch.loss), float(losses[0])  # type: ignore[arg-type]
        # Equal but for kernels that add in no fixed order: a bf16 loss has three digits, and GRPO's cancels to about 0.
        equal = torch.isclose(torch.tensor(repeated), torch.tensor(recorded), rtol=1e-3, atol=1e-5, equal_nan=True)
        unequal = (~equal).float().to(losses[0].device)
        if accelerator.reduce(unequal, "sum") > 0:  # one rank that stopped alone would leave the others waiting for it
            raise RuntimeError(
                f"{type(self.trainer).__name__}: the first loss was {recorded!r}, and {repeated!r} when it was repeated at "
                f"the same weights{' (on another rank it was another one)' if equal else ''}. A second pass needs a loss "
                "that depends on weights, inputs and random numbers alone. Keep what it counts or averages in plain "
                "attributes of the trainer, which are put back for the second pass, or train without GradRegOptimizer."
            )

    # Afterwards.

    def check_consulted(self) -> None:
        """Called by the optimizer's step: raise if the window that ends here had no second pass; note its metrics."""
        if self._regularizes() and not self._consulted:
            raise RuntimeError(self._not_repeatable("the optimizer's step was reached without compute_loss and backward"))
        self._consulted = False
        for name, value in self.optimizer.metrics.items():
            self._note(name, value)

    def _note_ratios(self, micro_batch: MicroBatch) -> None:
        """Note what a loss that has just run at θ' did with its ratio to the old policy, if it has one."""
        if hasattr(self.trainer, METHOD) or is_given(micro_batch.inputs):
            self._note("reweighted", float(bool(micro_batch.old) or is_given(micro_batch.inputs)))
        clipped = clipped_by_loss(self.trainer, micro_batch.counters)
        if clipped is not None:
            self._note("clipped_by_loss", clipped)

    def _note(self, name: str, value: Any) -> None:
        self._logged.setdefault(f"grad_reg/{name}", []).append(value)

    def _log(self, log: Callable[..., None], logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._replaying:
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


def _exchange(holder: Any, optimizer: Optimizer) -> None:
    """Make ``optimizer`` the one that ``holder``, a trainer or Accelerate's wrapper, holds."""
    holder.optimizer = optimizer
    if isinstance(holder, AcceleratedOptimizer):
        holder.__setstate__({})  # under a GradScaler it keeps the step method of the optimizer that it holds
