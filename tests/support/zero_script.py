"""Trainers for ``accelerate launch``: rank 0 writes what each ends with to the file named last.

    accelerate launch --config_file zero2.yaml zero_script.py CASE... FILE

A CASE is, for example, sft:optimizers:4 or sft:optimizers:1:bf16.
"""

import gc
import os
import sys
import tempfile
import warnings

import torch
from torch.optim import SGD

import gradreg_optim

# Before any trainer is imported, as a program may build its optimizer: trainers have to learn of
# wrappers nevertheless.
gradreg_optim.GradRegOptimizer(SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1))

import trainers  # noqa: E402
from transformers import training_args  # noqa: E402

warnings.simplefilter("ignore")


def run(kind, how, accumulation, precision="fp32"):
    """Train ``kind`` with the penalty given ``how``: the weights at the end, and the log."""
    use_cpu = "ACCELERATE_USE_DEEPSPEED" not in os.environ  # use_cpu would switch DeepSpeed off
    options = {
        "gradient_accumulation_steps": accumulation,
        "max_grad_norm": 0.5,
        "ddp_backend": "gloo",
        "use_cpu": use_cpu,
    }
    if precision == "bf16":
        # Transformers refuses bf16 without a GPU that has it, but for use_cpu, and use_cpu
        # switches DeepSpeed off.
        training_args.is_torch_bf16_gpu_available = lambda: True
        options["bf16"] = True
    given = trainers.REAL if how == "optimizers" else None
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainers.build(kind, folder, base=lambda m: SGD(m.parameters(), lr=0.1), wrapped=given, **options)
        if how == "attach":
            gradreg_optim.attach(trainer, **trainers.REAL)
        trainer.train()
        engine = type(trainer.model_wrapped).__name__
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        log = [{k: v for k, v in entry.items() if isinstance(v, (int, float))} for entry in trainer.state.log_history]
    return {
        "weights": {name: value.float().clone() for name, value in (state or {}).items()},
        "log": log,
        "engine": engine,
    }


if __name__ == "__main__":
    *cases, file = sys.argv[1:]
    found = {}
    for case in cases:
        kind, how, accumulation, *precision = case.split(":")
        found[case] = run(kind, how, int(accumulation), *precision)
        gc.collect()
    if torch.distributed.get_rank() == 0:
        torch.save(found, file)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
