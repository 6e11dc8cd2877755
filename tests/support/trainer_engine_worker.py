"""Trainers under the engines of Accelerate, as the ranks of a World run them; what each did comes back as plain tensors."""

from __future__ import annotations

import gc
import json
import logging
import os
import warnings
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import numpy
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from test_trainer_selfcheck import Elsewhere
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.tensor import DTensor
from torch.optim import SGD
from trainers import PLAIN, REAL, SPECIAL, WORDS, Spy, build, llama
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import deepspeed as integration
from trl import SFTTrainer

from gradreg_optim import GradRegCallback, GradRegOptimizer, attach
from gradreg_optim.trainers.micro_batches import Window

logging.disable(logging.WARNING)
warnings.simplefilter("ignore")

ZERO = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
FSDP = {
    "fsdp": "full_shard auto_wrap",
    "fsdp_config": {
        "version": 2,
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        "cpu_ram_efficient_loading": False,  # these two of transformers 4.57 need an accelerator
        "sync_module_states": False,
    },
}


@contextmanager
def fsdp_on_cpus():
    """Let Accelerate take FSDP for CPU ranks; everything behind that choice is its own and the Trainer's.

    ``AcceleratorState.__init__`` (accelerate 1.12 to 1.15) starts FSDP for ``MULTI_GPU`` and other
    accelerators, not for ``MULTI_CPU``, and the Trainer then silently trains under DDP. Goes when that list
    contains ``MULTI_CPU``.
    """
    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    with mock.patch.object(AcceleratorState, "__init__", init):
        yield


@contextmanager
def engine(name, folder):
    """The arguments of a trainer under ``name``, with the environment that ``accelerate launch`` would make for it."""
    arguments, before = {"ddp_backend": "gloo"}, dict(os.environ)
    AcceleratorState._reset_state(reset_partial_state=True)
    if name.startswith("zero"):
        zero = {"stage": int(name[-1]), "stage3_param_persistence_threshold": 20}
        zero["stage3_gather_16bit_weights_on_model_save"] = True
        config = Path(folder) / f"zero-of-{dist.get_rank()}.json"
        config.write_text(json.dumps({**ZERO, "zero_optimization": zero}))
        os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(config)}
        arguments["use_cpu"] = False  # which would switch DeepSpeed off
    if name == "fsdp2":
        arguments |= FSDP
        os.environ["FSDP_VERSION"] = "2"  # where transformers 4.57 finds it
    with fsdp_on_cpus() if name == "fsdp2" else nullcontext():
        try:
            yield arguments
        finally:
            integration.unset_hf_deepspeed_config()
            for key in os.environ.keys() - before.keys():
                del os.environ[key]
            os.environ.update(before)
            gc.collect()


def token_dataset(count=16):
    """Rows of equal length, as a collator that does not pad wants them."""
    ids = torch.randint(len(SPECIAL), len(SPECIAL + WORDS), (count, 6), generator=torch.Generator().manual_seed(3)).tolist()
    return Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 6] * count, "labels": ids})


def make(kind, folder, how, settings, *, model=None, optimizer=None, **arguments):
    """A trainer whose penalty comes with the optimizer (``"optimizers"``), by ``attach()`` or a callback, or not at all."""
    model = llama() if model is None else model
    if kind == "plain":
        base = optimizer(model) if how == "optimizers" else None
        trainer = Trainer(
            model=model,
            args=TrainingArguments(**{**PLAIN, "output_dir": str(folder), **arguments}),
            train_dataset=token_dataset(),
            optimizers=(base and GradRegOptimizer(base, **settings), None),
        )
        torch.manual_seed(11)
    else:
        given = {"base": optimizer, "wrapped": settings} if how == "optimizers" else {"base": None}
        if how == "callback":
            given["callbacks"] = [GradRegCallback(**settings)]
        trainer = build(kind, folder, model=model, **given, **arguments)
    if how == "attach":
        attach(trainer, **settings)
    if how == "late callback":
        trainer.add_callback(GradRegCallback(**settings))
    return trainer


def whole_weights(trainer):
    """The model's weights, gathered from all ranks; ``None`` where an engine gives them to rank 0 alone."""
    if trainer.is_deepspeed_enabled:
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        return state and {name: value.detach().clone() for name, value in state.items()}
    named = trainer.model.named_parameters()
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for name, p in named}


class Weights(TrainerCallback):
    """The weights before each step, and at the end."""

    def __init__(self, trainer):
        self.trainer, self.kept = trainer, []
        trainer.add_callback(self)

    def on_step_begin(self, *_, **__):
        self.kept.append(whole_weights(self.trainer))

    def on_train_end(self, *_, **__):
        self.kept.append(whole_weights(self.trainer))


class Reductions:
    """Counts how often DDP or FSDP2 reduced gradients over the ranks, up to each ``compute_loss`` and in all."""

    def __init__(self, trainer, spied):
        self.total, self.before = 0, []
        collective = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
        compute_loss, reduce_scatter, hooked = trainer.compute_loss, getattr(dist, collective), []

        def counting(state, bucket):
            self.total += not spied.is_paused
            return allreduce_hook(state, bucket)

        def scattering(*args, **kwargs):
            self.total += not spied.is_paused
            return reduce_scatter(*args, **kwargs)

        def spy(model, *args, **kwargs):
            if not hooked and hasattr(model, "register_comm_hook"):
                hooked.append(model.register_comm_hook(None, counting))
            if torch.is_grad_enabled() and not spied.is_paused:
                self.before.append(self.total)
            return compute_loss(model, *args, **kwargs)

        trainer.compute_loss = spy
        # Its name before torch 2.13 ends in "tensor".
        self.patched = mock.patch.object(dist, collective, scattering)

    def of_each(self):
        """Reductions in the backward of each micro-batch, first and second pass."""
        ends = [*self.before[1:], self.total]
        return [end - start for start, end in zip(self.before, ends, strict=True)]


def numbers(trainer):
    return [{k: v for k, v in entry.items() if isinstance(v, (int, float))} for entry in trainer.state.log_history]


def engine_counters(trainer):
    """What DeepSpeed's engine has counted, its throughput timer included."""
    engine = trainer.model_wrapped
    timer = {name: getattr(engine.tput_timer, name) for name in ("micro_step_count", "global_step_count", "started")}
    return {
        name: getattr(engine, name) for name in ("global_steps", "micro_steps", "global_samples", "skipped_steps")
    } | timer


def train(
    folder, name, kind="sft", how="optimizers", accumulation=1, dropout=0.0, checked=True, norm_of="step", **arguments
):
    """Two steps of plain descent at rate 1: inputs of both passes, weights over time, reductions, log, forwards."""
    with engine(name, folder) as settings, ExitStack() as patches:
        settings |= {"max_steps": 2, "learning_rate": 1.0, "optim": "sgd", "max_grad_norm": 1e9, **arguments}
        settings |= {"gradient_accumulation_steps": accumulation, "model": llama(attention_dropout=dropout)}
        wrapped = {**REAL, "norm_of": norm_of}
        trainer = make(kind, folder, how, wrapped, optimizer=lambda model: SGD(model.parameters(), lr=1.0), **settings)
        weights, spy, forwards = Weights(trainer), Spy(trainer), []
        reductions, compute_loss = Reductions(trainer, spy), trainer.compute_loss

        def outer(*args, **kwargs):
            forwards.append(torch.is_grad_enabled())
            return compute_loss(*args, **kwargs)

        trainer.compute_loss = outer
        patches.enter_context(reductions.patched)
        compare, timers = Window.compare_losses, []

        def timed_comparison(window):
            timer = getattr(trainer.model_wrapped, "tput_timer", None)
            if timer is not None:
                timer.start_step = 0  # let its stopwatch run from the first step
            timers.append(timer and dict(vars(timer)))
            found = None
            if checked:
                spy.is_paused = True
                found = compare(window)
                spy.is_paused = False
            timers.append(timer and dict(vars(timer)))
            return found

        patches.enter_context(mock.patch.object(Window, "compare_losses", timed_comparison))
        trainer.train()
        return {
            "engine": type(trainer.model_wrapped).__name__,
            "inputs": spy.inputs,
            "weights": weights.kept,
            "log": numbers(trainer),
            "reductions": reductions.of_each(),
            "forwards": forwards,
            "timer_kept": timers[0] == timers[1] if timers else True,
            "random": torch.get_rng_state(),
            "counters": engine_counters(trainer) if trainer.is_deepspeed_enabled else {},
        }


def train_with_hidden_state(folder, name, ranks, accumulation=2):
    """Train on a loss that counts where nobody looks, on some ranks: the error, how often it was computed, and weights."""
    with engine(name, folder) as settings:
        settings |= {"gradient_accumulation_steps": accumulation, "optim": "sgd", "trainer_class": Elsewhere}
        trainer = make("sft", folder, "attach", REAL, **settings)
        trainer.hidden, trainer.weight = Elsewhere.Count(), 0.1 if dist.get_rank() in ranks else 0.0
        weights = Weights(trainer)
        try:
            trainer.train()
        except RuntimeError as error:
            return str(error), trainer.hidden.value, [*weights.kept, whole_weights(trainer)]


def train_with_given_optimizer(folder, name):
    """What the Trainer says to ``optimizers=``."""
    with engine(name, folder) as settings:
        try:
            make(
                "sft",
                folder,
                "optimizers",
                REAL,
                optimizer=lambda model: SGD(model.parameters(), lr=1.0),
                **settings,
            )
        except RuntimeError as error:
            return str(error)


class Creating(SFTTrainer):
    """Makes the wrapper in ``create_optimizer``, as plugins of training stacks do."""

    def create_optimizer(self, *_):
        if self.optimizer is None:
            self.optimizer = GradRegOptimizer(SGD(self.model.parameters(), lr=1.0), **REAL)
        return self.optimizer


class Counting(SFTTrainer):
    """Counts its losses in a metric, an array, a tensor and the trainer's state."""

    class Meter:
        count = 0

        def update(self):
            self.count += 1

    def compute_loss(self, model, inputs, *args, **kwargs):
        if not hasattr(self.state, "tokens"):
            self.state.tokens = {"n": 0}
        self.state.tokens["n"] += 1
        self.meter.update()
        self.array += 1
        self.tensor += 1
        return super().compute_loss(model, inputs, *args, **kwargs)


def count_losses(folder, name, how):
    """How often two steps of two micro-batches counted their losses, in each place, with the penalty and without."""
    with engine(name, folder) as settings:
        settings |= {
            "gradient_accumulation_steps": 2,
            "max_steps": 2,
            "optim": "sgd",
            "trainer_class": Counting,
        }
        trainer = make("sft", folder, how, REAL, **settings)
        trainer.meter, trainer.array, trainer.tensor = Counting.Meter(), numpy.zeros(1), torch.zeros(1)
        trainer.train()
        return [trainer.state.tokens["n"], trainer.meter.count, trainer.array.item(), trainer.tensor.item()]


def train_created(folder, name):
    """Two steps with a wrapper that the trainer creates by itself: the last weights, and the figures of the penalty."""
    with engine(name, folder) as settings:
        settings |= {"max_steps": 2, "learning_rate": 1.0, "max_grad_norm": 1e9, "trainer_class": Creating}
        trainer = make("sft", folder, "created", REAL, **settings)
        trainer.train()
        return whole_weights(trainer), [entry for entry in numbers(trainer) if "grad_reg/penalty_ratio" in entry]
