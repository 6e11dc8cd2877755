"""Trainings that stop and go on under an engine, as the ranks of a World run them."""

from __future__ import annotations

import warnings

import torch
from trainer_engine_worker import engine, make, numbers, whole_weights
from trainers import OF_MICRO_BATCHES, Spy, adamw, llama

from gradreg_optim.trainers.adoption import find_wrapper

SCHEDULED = {
    "optimizers": {**OF_MICRO_BATCHES, "warmup_steps": 1, "schedule": "linear"},
    "attach": {**OF_MICRO_BATCHES, "schedule": "linear"},
}
RUN = {"max_steps": 4, "learning_rate": 1e-2, "lr_scheduler_type": "linear", "gradient_accumulation_steps": 2}
SAVING = {"save_strategy": "steps", "save_steps": 2}


def local(value):
    """A copy of what this rank holds of a tensor."""
    value = value.detach()
    return value.to_local().clone() if hasattr(value, "to_local") else value.clone()


def outcome(trainer):
    """Everything that a training ends with on this rank: weights, optimizer state, masters, groups, schedules, log."""
    wrapper = find_wrapper(trainer.optimizer)
    tensors = {f"weight {name}": value for name, value in (whole_weights(trainer) or {}).items()}
    for number, state in enumerate(wrapper.state.values()):
        tensors |= {f"{name} {number}": local(torch.as_tensor(value)) for name, value in state.items()}
    zero = getattr(trainer.model_wrapped, "optimizer", None)
    for kind in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        tensors |= {f"master {i}": local(master) for i, master in enumerate(getattr(zero, kind, []))}
    tensors["random numbers"] = torch.get_rng_state()
    groups = [{name: value for name, value in group.items() if name != "params"} for group in wrapper.param_groups]
    for group in groups:  # a list in FSDP's checkpoints
        group["betas"] = tuple(group["betas"])
    counted = {"steps": wrapper.step_count, "scheduler": trainer.lr_scheduler.state_dict()["last_epoch"]}
    if trainer.is_deepspeed_enabled:
        counted |= {name: getattr(trainer.model_wrapped, name) for name in ("global_steps", "global_samples")}
    # The last entry sums up.
    return {"tensors": tensors, "groups": groups, "counted": counted, "log": numbers(trainer)[:-1]}


def interrupted(folder, name, how):
    """A whole training and one that goes on from its middle: the outcome of both, and the passes of the second."""
    with engine(name, folder) as settings:
        settings |= {**RUN, "optimizer": adamw, "model": llama(attention_dropout=0.1)}
        whole = make("sft", folder, how, SCHEDULED[how], **settings, **SAVING)
        whole.train()
        first = outcome(whole)
    with engine(name, folder) as settings:
        settings |= {**RUN, "optimizer": adamw, "model": llama(seed=5, attention_dropout=0.1)}
        resumed = make("sft", folder, how, SCHEDULED[how], **settings)
        spy = Spy(resumed)
        resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        return first, outcome(resumed), len(spy.losses)


def from_plain(folder, name):
    """A training that goes on, attached, from the checkpoint of a plain one: what it warns, and its log."""
    with engine(name, folder) as settings:
        make("sft", folder, "none", {}, **settings, **{**RUN, "max_steps": 2}, **SAVING).train()
    with engine(name, folder) as settings, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make("sft", folder, "attach", SCHEDULED["optimizers"], **settings, **RUN)
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        said = [str(warning.message) for warning in caught if "GradRegOptimizer" in str(warning.message)]
        return said, numbers(trainer), find_wrapper(trainer.optimizer).step_count
