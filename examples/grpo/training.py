"""What the GRPO examples share: the regularized optimizer, and a run from the command line to the report."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel
from trl import GRPOConfig, GRPOTrainer

from examples.grpo.flags import InputError, parse
from examples.grpo.report import figure, save, summarize, table
from gradreg_optim import GradRegConfig, GradRegOptimizer

__all__ = ["regularized_adamw", "train"]


def regularized_adamw(model: PreTrainedModel, args: GRPOConfig, grad_reg: GradRegConfig) -> GradRegOptimizer:
    """The AdamW that Trainer would create, wrapped. Give it to the trainer as ``optimizers=(optimizer, None)``.

    Raises:
        InputError: a pattern of ``--grad_reg_exclude`` matches no parameter of the model.
    """
    adamw = torch.optim.AdamW(
        model.parameters(),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.weight_decay,
    )
    try:
        return GradRegOptimizer(adamw, model=model, **grad_reg.kwargs())
    except ValueError as error:
        raise InputError(error) from error


def train(
    script: str,
    argv: list[str],
    own: type,
    defaults: dict[str, Any],
    build: Callable[..., GRPOTrainer],
    title: Callable[[Any, str | None, float], str],
    *,
    saves: bool = False,
) -> None:
    """Read the command line, train, and report.

    Args:
        script: the name of the example's file.
        argv: the command line without the program.
        own: the dataclass of the example's own flags.
        defaults: defaults that replace those of TRL.
        build: makes the trainer from ``own``, GRPOConfig, ModelConfig and GradRegConfig.
        title: makes the title of the figure from ``own``, the model's name and the strength.
        saves: whether to save the model at the end.

    Raises:
        SystemExit: a value on the command line does not work; the message is one line.
    """
    try:
        given, args, model_args, grad_reg = parse(script, argv, own, defaults)
        trainer = build(given, args, model_args, grad_reg)
    except InputError as error:
        sys.exit(f"{script}: {' '.join(str(error).split())}")
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if saves:
        trainer.save_model(str(args.output_dir))
    if trainer.is_world_process_zero():
        heading = title(given, model_args.model_name_or_path, grad_reg.grad_reg_strength)
        write_report(trainer, heading, command=" ".join([script, *argv]))


def write_report(trainer: GRPOTrainer, title: str, command: str) -> None:
    """Print the table, and write the figure and the log to the output directory."""
    history, folder, console = trainer.state.log_history, Path(str(trainer.args.output_dir)), Console()
    folder.mkdir(parents=True, exist_ok=True)
    save(history, folder / "log_history.json", command)
    figure(history, folder / "training.png", title)
    console.print(table(summarize(history)))
    console.print(f"Figure: {folder / 'training.png'}   Log: {folder / 'log_history.json'}", soft_wrap=True)
