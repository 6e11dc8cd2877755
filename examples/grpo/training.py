"""What the GRPO examples share: the regularized optimizer, and a run from the command line to the report."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel
from trl import GRPOConfig, GRPOTrainer

from examples.grpo.flags import Arguments, InputError, parse
from examples.grpo.report import comparison, figure, save, summarize, table
from gradreg_optim import GradRegConfig, GradRegOptimizer

__all__ = ["regularized_adamw", "train"]


def regularized_adamw(model: PreTrainedModel, args: GRPOConfig, grad_reg: GradRegConfig) -> GradRegOptimizer:
    """The AdamW that Trainer would create, wrapped: for the trainer's ``optimizers=(optimizer, None)``.

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
    title: Callable[[Any, str | None, float | str], str],
    *,
    saves: bool = False,
) -> None:
    """Read the command line, train, and report.

    With an own flag ``compare`` that is true, the same run without the penalty comes first. Both start from
    the same weights and seed, and see the same prompts. Where a comparison makes no sense there is none:
    under strength 0, on several processes, and when a run is resumed.

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
        given, args, model_args, grad_reg = arguments = parse(script, argv, own, defaults)
        compares = getattr(given, "compare", False) and grad_reg.grad_reg_strength != 0
        runs: dict[str, list[dict[str, Any]]] = {}
        if compares and args.world_size == 1 and args.resume_from_checkpoint is None:
            runs["plain"] = _run_plain(build, parse(script, argv, own, defaults))
            gc.collect()  # model and optimizer are in circles of references
        trainer = build(*arguments)
    except InputError as error:
        sys.exit(f"{script}: {' '.join(str(error).split())}")
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if saves:
        trainer.save_model(str(args.output_dir))
    if trainer.is_world_process_zero():
        runs["regularized" if grad_reg.grad_reg_strength != 0 else "plain"] = trainer.state.log_history
        heading = title(given, model_args.model_name_or_path, grad_reg.kwargs()["strength"])
        write_report(runs, Path(str(args.output_dir)), heading, command=" ".join([script, *argv]))


def _run_plain(build: Callable[..., GRPOTrainer], arguments: Arguments) -> list[dict[str, Any]]:
    """Train at strength 0, where the wrapper is AdamW bit for bit; the log."""
    given, args, model_args, grad_reg = arguments
    args.output_dir = str(Path(str(args.output_dir)) / "plain")
    trainer = build(given, args, model_args, replace(grad_reg, grad_reg_strength=0.0))
    trainer.train()
    return trainer.state.log_history


def write_report(runs: dict[str, list[dict[str, Any]]], folder: Path, title: str, command: str) -> None:
    """Print the table and what to make of it, and write the figure and the logs to ``folder``."""
    console = Console()
    folder.mkdir(parents=True, exist_ok=True)
    save(runs, folder / "log_history.json", command)
    figure(runs, folder / "training.png", title)
    console.print(table({name: summarize(history) for name, history in runs.items()}))
    if len(runs) > 1:
        console.print(comparison(**runs), highlight=False)
    console.print(f"Figure: {folder / 'training.png'}   Log: {folder / 'log_history.json'}", soft_wrap=True)
