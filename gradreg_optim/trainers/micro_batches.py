"""The micro-batches of one step in a trainer: recorded in the first pass, repeated in the further ones.

A second pass can repeat a micro-batch that consists of one ``compute_loss`` and one ``accelerator.backward``;
anything else is refused. It repeats the Trainer's own ``training_step``, which scales losses as its version
does, on the inputs that ``compute_loss`` got. Each micro-batch starts from the random numbers and the
trainer's state of its first pass.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer

from gradreg_optim.core.same_start import RandomState
from gradreg_optim.core.step import Point
from gradreg_optim.trainers.generations import Generations, Recorded
from gradreg_optim.trainers.old_policy import FirstPass, OldPolicy, clipped_so_far
from gradreg_optim.trainers.patches import Patches
from gradreg_optim.trainers.snapshot import State, copied, put_state, state_of, untouched


@dataclass
class MicroBatch:
    """The state before the first pass over a micro-batch, and the results of that pass.

    ``generations`` holds results of methods that are not called again, ``first`` what ``resample`` needs, and
    ``clipped_before`` how many clipped fractions the trainer had logged.
    """

    model: nn.Module
    inputs: Any
    num_items_in_batch: Any
    random: RandomState
    state: State
    is_last: bool
    loss: Tensor | None = None
    generations: list[Recorded] = field(default_factory=list)
    first: FirstPass = field(default_factory=FirstPass)
    clipped_before: dict[str, int] = field(default_factory=dict)


class Window:
    """The micro-batches of one window of gradient accumulation, which is one step of the ``optimizer``.

    ``passes`` are those of the step, or, if the norm is that of micro-batches (``is_apart``), those of the
    micro-batch that began last. ``is_repeating`` tells whether a further one runs. Memory: the inputs of the
    window, or of one micro-batch. Without a penalty nothing is recorded.
    """

    def __init__(
        self, trainer: Trainer, optimizer: Any, generations: Generations, old_policy: OldPolicy
    ) -> None:
        self.micro_batches: list[MicroBatch] = []
        self.is_complete = False  # after the last backward of the first pass
        self.is_regularized = False  # after the further passes
        self.is_repeating = False
        self.is_apart = optimizer.norm_of != "step" and optimizer.plan().regularizes
        self.begun = 0  # micro-batches
        self._trainer, self._optimizer = trainer, optimizer
        self._generations, self._old_policy = generations, old_policy
        self._allows_backwards = False
        self._expected = ""  # the next call of a regularized micro-batch: "loss", then "backward", then none
        self._is_engine = hasattr(
            optimizer, "held_step"
        )  # DeepSpeed's, which decides itself when to reduce gradients
        optimizer.progress.outcomes.clear()  # of a window that was interrupted
        self._begin_passes()

    @property
    def regularizes(self) -> bool:
        """Whether the step has further passes."""
        return bool(self.passes.plan.regularizes)

    # The first pass.

    def _begin_passes(self) -> None:
        # The window restores random numbers and states of modules by itself, for each micro-batch.
        number = self._trainer.current_gradient_accumulation_steps if self.is_apart else 1
        self.passes = self._optimizer.begin(
            lambda _point: nullcontext(), micro_batches=number, is_apart=self.is_apart
        )
        next(self.passes)  # at θ

    def begin_micro_batch(self) -> None:
        """Expect one loss and its backward."""
        if self.is_apart and self.begun:
            self._begin_passes()
        self.begun += 1
        self._expected = "loss" if self.regularizes else ""

    @contextmanager
    def closed_by_errors(self) -> Iterator[None]:
        """Around a training step: the sum so far comes back at once, not when the next training begins."""
        try:
            yield
        except BaseException:
            if self.is_apart:
                self.passes.close()
            raise

    @contextmanager
    def reduced_by_engine(self) -> Iterator[None]:
        """Around a backward: DeepSpeed takes each micro-batch for the last one of a window."""
        state: Any = self._trainer.accelerator.gradient_state
        before = state.sync_gradients
        if self.is_apart and self._is_engine:
            state._set_sync_gradients(True)
        try:
            yield
        finally:
            state._set_sync_gradients(before)

    @property
    def is_due(self) -> bool:
        """Whether the further passes come now: after each micro-batch, or after the last one."""
        return self.regularizes and (self.is_apart or self.is_complete)

    def record(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> MicroBatch | None:
        """Record the state before a loss is computed; ``None`` where nothing is recorded."""
        if not self._expected:
            return None
        if self._expected != "loss":
            raise not_repeatable(self._trainer, "compute_loss was called twice in one micro-batch")
        self._expected = "backward"
        random, is_last = RandomState(self.passes.storage.devices), self._trainer.accelerator.sync_gradients
        micro_batch = MicroBatch(
            model, copied(inputs), num_items_in_batch, random, state_of(self._trainer), is_last
        )
        if not self.micro_batches:
            self._look_at_modules(model)
        self.micro_batches.append(micro_batch)
        return micro_batch

    def record_loss(self, loss: Tensor) -> None:
        """Record the loss whose backward is about to run."""
        if self.regularizes and self._expected != "backward":
            raise not_repeatable(self._trainer, "accelerator.backward got a loss that is not compute_loss's")
        if self.regularizes:
            self.micro_batches[-1].loss = loss.detach()

    def allowing_backwards(self) -> Patches:
        """Around what further passes repeat: ``compute_loss`` and ``accelerator.backward``."""
        return Patches().set(self, "_allows_backwards", True)

    def refusing_other_backwards(self) -> Patches:
        """Around ``training_step``: raise before it runs a backward of its own.

        Adversarial training (FGM, PGD), contrastive or auxiliary terms are often written so. Further passes
        would lack its gradient, and the difference of the gradients would contain it. Every backward in
        Python calls ``torch.autograd.backward``.
        """

        def check(backward: Callable[..., Any], tensors: Any, *args: Any, **kwargs: Any) -> Any:
            if self.regularizes and not self._allows_backwards:
                starts = [tensors] if isinstance(tensors, Tensor) else list(tensors)
                inputs = kwargs.get("inputs", args[4] if len(args) > 4 else None)
                reached = (
                    list(_leaves(starts))
                    if inputs is None
                    else [inputs]
                    if isinstance(inputs, Tensor)
                    else inputs
                )
                known = {id(p) for group in self._optimizer._groups_with_names() for p in group["params"]}
                # In FSDP2's graph other parameters are whole ones.
                is_sharded = isinstance(self._trainer.model_wrapped, FSDPModule)
                if any(
                    id(leaf) in known or (is_sharded and isinstance(leaf, nn.Parameter)) for leaf in reached
                ):
                    raise not_repeatable(self._trainer, "training_step ran a backward besides compute_loss's")
            return backward(tensors, *args, **kwargs)

        return Patches().answer(torch.autograd, "backward", check)

    def end_micro_batch(self) -> None:
        """The gradient of the micro-batch is accumulated."""
        self._expected, self.is_complete = "", self._trainer.accelerator.sync_gradients

    def _look_at_modules(self, model: nn.Module) -> None:
        beside = (value for value in vars(self._trainer).values() if isinstance(value, nn.Module))
        self._optimizer._module_state.begin(model, *beside)

    # The further passes.

    def further_passes(self) -> Iterator[MicroBatch]:
        """Repeat the window at each further point; yields each micro-batch after its backward ahead."""
        state = self._optimizer._module_state
        for point in self.passes:
            is_first = point is Point.THETA  # again, since the first forward wrote weights
            if is_first:
                self._look_at_modules(self.micro_batches[0].model)
            modules = nullcontext() if is_first else state.repeated()
            with self._prepared(modules), torch.enable_grad():
                for micro_batch in self.micro_batches:
                    is_sent = micro_batch.is_last or self._is_engine
                    with nullcontext() if is_sent else self._trainer.accelerator.no_sync(micro_batch.model):
                        self._repeat(micro_batch)
                    if point is Point.AHEAD:
                        yield micro_batch
            if is_first:
                state.end()
        self.is_regularized = self.is_complete and not self._optimizer.progress.outcomes

    @contextmanager
    def _prepared(self, modules: AbstractContextManager[None]) -> Iterator[Patches]:
        """Let the block repeat micro-batches; then restore trainer, random numbers, modules and engine."""
        trainer: Any = self._trainer
        gradient_state = trainer.accelerator.gradient_state
        with (
            untouched(trainer),
            RandomState(self.passes.storage.devices).replayed(),
            modules,
            self._optimizer.held_step.repeated()
            if self._is_engine
            else nullcontext(),  # forwards restart its timer
            Patches() as replaced,
        ):
            trainer.log = lambda *_, **__: None  # ``untouched`` restores both methods
            if not self._generations.methods:
                trainer._prepare_inputs = lambda inputs: inputs
            replaced.set(self, "is_repeating", True)
            replaced.set(self._generations, "repeated", None)
            replaced.callback(gradient_state._set_sync_gradients, gradient_state.sync_gradients)
            yield replaced

    def _repeat(self, micro_batch: MicroBatch) -> None:
        """Run the training step of one micro-batch from its recorded state."""
        trainer, inputs = self._trainer, copied(micro_batch.inputs)
        put_state(trainer, micro_batch.state)
        micro_batch.clipped_before = clipped_so_far(trainer)
        micro_batch.random.restore()
        trainer.accelerator.gradient_state._set_sync_gradients(micro_batch.is_last)
        self._generations.repeated = iter(micro_batch.generations)
        is_whole = bool(self._generations.methods)
        step = trainer.training_step if is_whole else functools.partial(Trainer.training_step, trainer)
        # TRL's activation offloading is entered for each training step, or later backwards free nothing.
        offloading = getattr(trainer, "maybe_activation_offload_context", nullcontext())
        with offloading, self._old_policy.repeating(inputs, micro_batch.first):
            step(micro_batch.model, inputs, micro_batch.num_items_in_batch)

    # The repeated loss.

    def compare_losses(self) -> str | None:
        """Repeat the first loss at θ; ``None`` if it is the same, else what the two were. All ranks agree.

        Costs one forward, and a second, with gradients, for a loss that differentiates by itself or looks
        whether it may. Under FSDP2 it costs one with gradients and its backward: the end of a backward ends a
        forward there.
        """
        accelerator: Any = self._trainer.accelerator
        recorded = repeated = equal = cast(Tensor, self.micro_batches[0].loss)
        for enabled in (True,) if _is_fsdp2(self.micro_batches[0].model) else (False, True):
            try:
                repeated = self._repeated_loss(self.micro_batches[0], enabled)
            except RuntimeError as error:  # of autograd, perhaps, which finds nothing to differentiate
                if enabled or isinstance(error, torch.OutOfMemoryError):
                    raise
                repeated = recorded + math.inf
            # Kernels add in no fixed order, a bf16 loss has three digits, and GRPO's terms cancel.
            equal = torch.isclose(repeated.float(), recorded.float(), rtol=1e-3, atol=1e-5, equal_nan=True)
            if accelerator.reduce((~equal).float(), "sum") == 0:
                return None
        values = f"{float(recorded)!r}, and {float(repeated)!r} when it was repeated at the same weights"
        return f"{values} (they differ on another rank)" if equal else values

    def _repeated_loss(self, micro_batch: MicroBatch, enabled: bool) -> Tensor:
        """The loss of ``micro_batch`` at the current weights, with gradients ``enabled`` or without."""
        losses: list[Tensor] = []
        accelerator: Any = self._trainer.accelerator
        has_backward = _is_fsdp2(micro_batch.model)

        def backward(loss: Tensor, **_: Any) -> None:
            losses.append(loss.detach())
            if has_backward:
                torch.autograd.backward(loss)

        repeated = self._prepared(self._optimizer._module_state.repeated())
        with repeated as replaced, torch.set_grad_enabled(enabled), warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "None of the inputs have requires_grad=True"
            )  # reentrant checkpointing
            replaced.set(accelerator, "backward", backward)
            for parameter in micro_batch.model.parameters():  # a loss may run a backward
                replaced.callback(setattr, parameter, "grad", parameter.grad)
                parameter.grad = None
            is_sent = not enabled or has_backward or self._is_engine
            with nullcontext() if is_sent else accelerator.no_sync(micro_batch.model):
                self._repeat(micro_batch)
        return losses[0]


def not_repeatable(trainer: Trainer, what: str) -> RuntimeError:
    """Return the error about a trainer that does ``what``, which a second pass cannot repeat."""
    return RuntimeError(
        f"{type(trainer).__name__}: {what}. The second pass repeats micro-batches of one compute_loss and "
        "one accelerator.backward each. It would leave out or change the penalty of any other step. Call "
        "optimizer.step(closure) in a training loop of your own, or train without GradRegOptimizer."
    )


def _is_fsdp2(model: nn.Module) -> bool:
    return any(isinstance(module, FSDPModule) for module in model.modules())


def _leaves(tensors: list[Tensor]) -> Iterator[Tensor]:
    """The tensors into which a backward from ``tensors`` accumulates gradients."""
    yield from (tensor for tensor in tensors if tensor.grad_fn is None)
    todo: list[Any] = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen: set[Any] = set(todo)
    for node in todo:  # the loop appends to it
        if hasattr(node, "variable"):
            yield node.variable
        new = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= new
        todo += new
