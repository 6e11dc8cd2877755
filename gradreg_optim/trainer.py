"""Trainers: the micro-batches that a Transformers or TRL trainer has just run become the closure.

A trainer calls ``optimizer.step()`` without a closure, after many micro-batches and its own gradient clipping. The
attachment therefore listens at two of the trainer's methods: ``compute_loss`` tells the *prepared* inputs and the random
state of each micro-batch, and ``accelerator.backward`` tells when the last gradient of the window is complete. At that
moment, before anything is clipped, the recorded micro-batches run once more at θ' through the Trainer's own
``training_step``, which scales the loss as the installed version does. Nothing is generated or scored again, and whatever
the second pass counts or logs on the trainer is dropped.

Relied upon (transformers 4.57 to 5.23): ``Trainer.training_step`` calls ``optimizer.train()``, ``_prepare_inputs``,
``compute_loss`` and ``accelerator.backward`` in this order, and ``accelerator.sync_gradients`` marks the last micro-batch
of a window. ``tests/test_trainer.py`` fails when one of these changes.
"""

from __future__ import annotations

import copy
import functools
import sys
import time
from collections import UserDict, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer

from gradreg_optim.config import GradRegConfig
from gradreg_optim.optimizer import GradRegOptimizer
from gradreg_optim.perturbation import RandomState

__all__ = ["Attachment", "attach", "attach_to_caller", "default_exclusion", "detach"]

HEADS = ("score", "classifier", "v_head", "value_head", "reward_head")
"""Attributes under which Transformers and TRL keep value, reward and classification heads."""

_WRAPPED = ("module", "_orig_mod", "base_model", "model", "pretrained_model")
_DATA = ("train_dataset", "eval_dataset", "_buffered_inputs")


def attach(trainer: Trainer, config: GradRegConfig | None = None, **settings: Any) -> None:
    """Regularize a trainer's steps; nothing else about the trainer changes.

    Needed when the trainer creates the optimizer itself (model ids, FSDP): whatever ``create_optimizer`` returns is then
    wrapped. A trainer that was given a :class:`GradRegOptimizer` as ``optimizers=`` attaches by itself when it trains.

    Args:
        trainer: a :class:`transformers.Trainer` or any TRL trainer based on it, before or after training.
        config: the settings, as parsed from a command line.
        settings: keyword arguments of :class:`GradRegOptimizer`; they override ``config``.

    Raises:
        TypeError: ``trainer`` is not a ``transformers.Trainer``.
        RuntimeError: the trainer is attached already.
        ValueError: settings are given, but the trainer's optimizer is a :class:`GradRegOptimizer` with its own.
    """
    if not isinstance(trainer, Trainer):
        raise TypeError(
            f"trainer={trainer!r} is a {type(trainer).__name__}: attach() works on transformers.Trainer and TRL trainers. "
            "In a loop of your own, call optimizer.step(closure) instead."
        )
    if _attachment(trainer) is not None:
        raise RuntimeError("attach: this trainer is attached already. Call detach(trainer) first.")
    settings = {**(config.kwargs() if config is not None else {}), **settings}
    optimizer = find_wrapper(trainer.optimizer)
    if optimizer is not None and settings:
        raise ValueError(
            f"attach got {sorted(settings)}, but the trainer's optimizer is a GradRegOptimizer with settings of its own. "
            "Give them to one of the two."
        )
    Attachment(trainer, optimizer, settings)


def detach(trainer: Trainer) -> None:
    """Undo :func:`attach`: the trainer's methods are its own again, and its optimizer is the one that was wrapped.

    Raises:
        RuntimeError: the trainer is not attached.
    """
    attachment = _attachment(trainer)
    if attachment is None:
        raise RuntimeError("detach: this trainer is not attached. attach(trainer) comes first.")
    attachment.detach()


def attach_to_caller(optimizer: Optimizer) -> None:
    """Attach ``optimizer`` to the trainer whose ``training_step`` is calling it; do nothing if there is none."""
    frame = sys._getframe(1)
    while frame is not None:
        trainer = frame.f_locals.get("self")
        if isinstance(trainer, Trainer) and (found := find_wrapper(trainer.optimizer)) is optimizer:
            Attachment(trainer, found, {})
            return
        frame = frame.f_back  # type: ignore[assignment]


def find_wrapper(optimizer: Any) -> GradRegOptimizer | None:
    """The :class:`GradRegOptimizer` in a chain of wrappers (Accelerate's, an engine's), or ``None``."""
    while optimizer is not None and not isinstance(optimizer, GradRegOptimizer):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def default_exclusion(model: Any) -> list[nn.Parameter]:
    """Parameters of the input and output embeddings and of value, reward and classification heads, found as modules."""
    layers: list[nn.Module] = [model]
    found: list[Any] = []
    for layer in layers:  # grows while it is walked: PEFT, value heads, DDP and compilation all wrap the real model
        for name in _WRAPPED:
            inner = getattr(layer, name, None)
            if isinstance(inner, nn.Module) and all(inner is not known for known in layers):
                layers.append(inner)
        found += [getattr(layer, name, None) for name in HEADS]
        for name in ("get_input_embeddings", "get_output_embeddings"):
            with suppress(AttributeError, NotImplementedError):  # Transformers models without such embeddings
                found.append(getattr(layer, name)())
    return [parameter for module in found if isinstance(module, nn.Module) for parameter in module.parameters()]


@dataclass
class MicroBatch:
    """What the first pass over a micro-batch started from."""

    model: nn.Module
    inputs: Any
    num_items_in_batch: Any
    random: RandomState
    counters: dict[str, Any]
    is_last: bool


class Attachment:
    """The tie between one trainer and one wrapper: records micro-batches, repeats them at θ', logs ``grad_reg/*``."""

    def __init__(self, trainer: Trainer, optimizer: GradRegOptimizer | None, settings: dict[str, Any]) -> None:
        self.trainer = trainer
        self._settings = settings
        self._undo: list[Callable[[], None]] = []
        self._micro_batches: list[MicroBatch] = []
        self._replaying = False
        self._consulted = False
        self._logged: dict[str, list[Any]] = {}
        self._listen(trainer, "compute_loss", self._compute_loss)
        self._listen(trainer, "_prepare_inputs", self._prepare_inputs)
        self._listen(trainer, "log", self._log)
        self._listen(trainer.accelerator, "backward", self._backward)
        if optimizer is not None:
            self._adopt(optimizer)
        elif trainer.optimizer is not None:
            self._wrap_existing(trainer)
        else:
            self._listen(trainer, "create_optimizer", self._create_optimizer)
        trainer._gradreg_attachment = self  # type: ignore[attr-defined]

    def detach(self) -> None:
        """Give the trainer its methods and its optimizer back."""
        for undo in reversed(self._undo):
            undo()
        del self.trainer._gradreg_attachment  # type: ignore[attr-defined]
        holder: Any = self.trainer
        while holder.optimizer is not None and holder.optimizer is not self.optimizer:
            holder = holder.optimizer
        if holder.optimizer is not None:
            holder.optimizer = self.optimizer.optimizer
            self.optimizer._attachment = None

    # Making the wrapper the trainer's.

    def _create_optimizer(self, create: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        created = create(*args, **kwargs)
        if find_wrapper(created) is None:
            self._wrap_existing(self.trainer)
        return self.trainer.optimizer

    def _wrap_existing(self, holder: Any) -> None:
        while getattr(holder.optimizer, "optimizer", None) is not None:  # Accelerate's wrapper of an earlier training
            holder = holder.optimizer
        holder.optimizer = GradRegOptimizer(holder.optimizer, model=self.trainer.model, **self._settings)
        self._adopt(holder.optimizer)

    def _adopt(self, optimizer: GradRegOptimizer) -> None:
        accelerator = self.trainer.accelerator
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise RuntimeError("GradRegOptimizer does not run under DeepSpeed yet. Train without a DeepSpeed configuration.")
        self.optimizer = optimizer
        if optimizer._model is None:
            optimizer._model = self.trainer.model
        if not optimizer.exclude:
            optimizer.leave_out(default_exclusion(self.trainer.model))
        optimizer._scaler = accelerator.scaler
        optimizer._attachment = self

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

    def _compute_loss(
        self, compute_loss: Callable[..., Any], model: nn.Module, inputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if not self._replaying and torch.is_grad_enabled() and self._regularizes():
            self._micro_batches.append(
                MicroBatch(
                    model=model,
                    inputs=_copied(inputs),
                    num_items_in_batch=kwargs.get("num_items_in_batch", args[1] if len(args) > 1 else None),
                    random=RandomState(self.optimizer._devices()),
                    counters=_counters(self.trainer),
                    is_last=self.trainer.accelerator.sync_gradients,
                )
            )
        return compute_loss(model, inputs, *args, **kwargs)

    def _backward(self, backward: Callable[..., Any], loss: Tensor, *args: Any, **kwargs: Any) -> None:
        backward(loss, *args, **kwargs)
        if self._micro_batches and self._micro_batches[-1].is_last and not self._replaying:
            start = time.perf_counter()
            try:
                self.optimizer.regularize_(self._replay)
            finally:
                self._micro_batches.clear()
            self._note("second_pass_time", time.perf_counter() - start)
            self._consulted = True

    def _prepare_inputs(self, prepare: Callable[..., Any], inputs: Any) -> Any:
        return inputs if self._replaying else prepare(inputs)

    def _regularizes(self) -> bool:
        if self.optimizer.param_groups[0]["gradreg_schedule_steps"] is None:
            rise = self.trainer.state.max_steps - self.optimizer.param_groups[0]["gradreg_warmup_steps"]
            for group in self.optimizer.param_groups:
                group["gradreg_schedule_steps"] = max(1, rise)
        return self.optimizer.regularizes

    # The second pass.

    def _replay(self) -> None:
        """Run the recorded micro-batches again, each from where it started, through the Trainer's own training step."""
        accelerator, trainer = self.trainer.accelerator, self.trainer
        with (
            _untouched(trainer),
            RandomState(self.optimizer._devices()).replayed(),
            torch.enable_grad(),
            ExitStack() as done,
        ):
            self._replaying = True
            done.callback(setattr, self, "_replaying", False)
            done.callback(accelerator.gradient_state._set_sync_gradients, accelerator.sync_gradients)
            for micro_batch in self._micro_batches:
                vars(trainer).update(micro_batch.counters)
                micro_batch.random.restore()
                accelerator.gradient_state._set_sync_gradients(micro_batch.is_last)
                gathering = nullcontext() if micro_batch.is_last else accelerator.no_sync(micro_batch.model)
                with gathering:
                    Trainer.training_step(trainer, micro_batch.model, micro_batch.inputs, micro_batch.num_items_in_batch)

    # Afterwards.

    def check_consulted(self) -> None:
        """Called by the optimizer's step: raise if the window that ends here had no second pass; note its metrics."""
        if self._regularizes() and not self._consulted:
            raise RuntimeError(
                f"{type(self.trainer).__name__} reached its optimizer step, but its gradients did not come from "
                "compute_loss and accelerator.backward: they are not regularized. This trainer has a training loop of its own; call "
                "optimizer.step(closure) in it, or train without GradRegOptimizer."
            )
        self._consulted = False
        for name, value in self.optimizer.metrics.items():
            self._note(name, value)

    def _note(self, name: str, value: Any) -> None:
        self._logged.setdefault(f"grad_reg/{name}", []).append(value)

    def _log(self, log: Callable[..., None], logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:  # the figures of training; evaluation and the summary at the end have other keys
            for name, values in self._logged.items():
                counts_up = name == "grad_reg/skipped"
                logs[name] = float(values[-1]) if counts_up else sum(map(float, values)) / len(values)
            self._logged.clear()
        log(logs, *args, **kwargs)


def _attachment(trainer: Trainer) -> Attachment | None:
    return getattr(trainer, "_gradreg_attachment", None)


def _copied(value: Any) -> Any:
    """Copies of the containers, the tensors themselves inside: losses pop keys and append to lists."""
    if isinstance(value, (dict, list, deque)):
        copied: Any = copy.copy(value)
        for key in range(len(copied)) if isinstance(copied, (list, deque)) else list(copied):
            copied[key] = _copied(copied[key])
        return copied
    if isinstance(value, UserDict):
        copied = copy.copy(value)
        copied.data = _copied(value.data)
        return copied
    return copy.copy(value) if isinstance(value, set) else value


def _counters(trainer: Trainer) -> dict[str, Any]:
    """The trainer's attributes that a loss can rebind: numbers, strings, tensors, ``None``."""
    return {
        name: value
        for name, value in vars(trainer).items()
        if value is None or isinstance(value, (bool, int, float, str, Tensor))
    }


@contextmanager
def _untouched(trainer: Trainer) -> Iterator[None]:
    """Let the block work on copies of the trainer's metrics, counters and buffers, and put the originals back after it."""
    before = dict(vars(trainer))
    for name, value in before.items():
        if isinstance(value, (dict, list, deque, set)) and name not in _DATA:
            setattr(trainer, name, _copied(value))
    trainer.state = copy.copy(trainer.state)
    try:
        yield
    finally:
        vars(trainer).clear()
        vars(trainer).update(before)
