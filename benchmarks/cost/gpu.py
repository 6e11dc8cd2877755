"""Is a regularized step right on this GPU, and what does it cost there?

    python -m benchmarks.cost.gpu                           # at most 6 minutes on one GPU
    python -m benchmarks.cost.gpu --quick --device cpu      # toy sizes, to see that everything runs

First the checks: the step on one device (gpu_step), in a process group of one rank (gpu_ranks) and in trainers
(gpu_trainers). Then the costs (gpu_cost): steps of a model of Qwen2-0.5B's shape against two gradients and one AdamW step
and against other optimizers, what a step does beyond its passes, and a step of GRPO that generates. Whatever needs a package
that is not installed is left out, by name. The exit status is 1 if anything failed; goals that are missed are only reported.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.common.results import stamp, todays
from benchmarks.cost import gpu_cost
from benchmarks.cost.gpu_checks import Outcome, outcome_of, run_checks
from benchmarks.cost.gpu_tables import document
from benchmarks.cost.peers import missing

PACKAGES = ("triton", "transformers", "trl", "accelerate", "deepspeed", "pytorch_optimizer", "zij")
GRPO_SECONDS = 45.0
"""What is kept of the time for the steps of GRPO."""


class Report:
    """The figures so far. They are written after every part, so that a run that is cut short leaves what it has."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.output: Path = args.output
        self.found: dict[str, Any] = {
            "settings": {name: value for name, value in vars(args).items() if name != "output"},
            "checks": [],
            "cells": {},
            "beyond": {},
            "grpo": None,
            "missing": {name: reason for name, reason in missing().items() if name in gpu_cost.ON_GPU},
        }

    def add(self, outcome: Outcome) -> None:
        """Note an outcome; a failure is shown at once."""
        self.found["checks"].append(asdict(outcome))
        if outcome.status == "failed":
            tqdm.write(f"FAILED: {outcome.name}: {outcome.words}\n{outcome.details}", file=sys.stderr)

    def measure(self, name: str, part: Callable[[], Any]) -> Any:
        """What ``part`` returns; ``None`` if it failed or was skipped, which is noted like the outcome of a check."""
        figures: list[Any] = []
        self.add(outcome_of("costs", name, lambda: figures.append(part()) or ""))
        self.write()
        gc.collect()  # models are in circles of references
        torch.cuda.empty_cache()
        return figures[0] if figures else None

    def write(self) -> str:
        """Write both files; returns the document."""
        versions = {name: found for name in PACKAGES if (found := _version(name))}
        self.found["stamp"] = stamp()
        self.found["stamp"]["versions"] += "".join(f", {name} {found}" for name, found in versions.items())
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.output.with_suffix(".json").write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        text = document(self.found)
        self.output.with_suffix(".md").write_text(text, encoding="utf-8")
        return text

    @property
    def has_failed(self) -> bool:
        return any(outcome["status"] == "failed" for outcome in self.found["checks"])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def check(report: Report, device: torch.device) -> None:
    """Run all checks."""
    with tqdm(desc="checks", unit="", leave=False) as bar:

        def note(outcome: Outcome) -> None:
            bar.set_postfix_str(outcome.name)
            bar.update()
            report.add(outcome)
            report.write()

        run_checks(device, note)


def cost(report: Report, device: torch.device, shape: gpu_cost.Shape, deadline: float) -> None:
    """Measure all costs; each cell gets a share of the time that is left."""
    for name, (arithmetic, settings) in gpu_cost.SETTINGS.items():
        beyond = report.measure(f"beyond the passes: {name}", partial(gpu_cost.beyond, shape, arithmetic, device, settings))
        report.found["beyond"] |= {name: beyond} if beyond else {}
    todo = list(gpu_cost.CELLS)
    while todo:
        share = todo[0].weight / sum(cell.weight for cell in todo)
        seconds = 0.8 * share * (deadline - GRPO_SECONDS - time.monotonic())  # the rest of the share warms up
        cell = todo.pop(0)
        figures = report.measure(cell.name, partial(gpu_cost.measure, shape, cell, device, seconds))
        report.found["cells"] |= {cell.name: figures} if figures else {}
    report.found["grpo"] = report.measure("GRPO with generation", partial(gpu_cost.grpo, shape, device))


def parse_arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.cost.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="toy sizes; the result goes to runs/quick")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--minutes", type=float, default=5.5, help="for everything; each cell takes at least four rounds")
    parser.add_argument("--only", choices=["checks", "costs"], help="leave out the other half")
    parser.add_argument("--output", type=Path, help="path without suffix; default: results/<date>-gpu-cost/result")
    args = parser.parse_args(given)
    if args.device == "cuda":
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # with several, a trainer takes them all
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here. To see that everything runs: --quick --device cpu")
    if args.device == "cpu" and not args.quick:
        parser.error("--device cpu: without --quick the model is too large for a CPU. Add --quick")
    args.output = args.output or todays("gpu-cost", quick=args.quick)
    return args


def main(given: list[str] | None = None) -> int:
    """Check, measure and write; returns the exit status."""
    start, args = time.monotonic(), parse_arguments(given)
    device, report = torch.device(args.device), Report(args)
    if args.only != "costs":
        check(report, device)
    if args.only != "checks":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Gradient regularization: the self-check")  # low in bf16 on random tokens
            warnings.filterwarnings("ignore", category=FutureWarning)  # of TRL and Transformers about each other
            cost(report, device, gpu_cost.TOY if args.quick else gpu_cost.QWEN2, start + 60 * args.minutes)
    print(report.write())
    return int(report.has_failed)


if __name__ == "__main__":
    sys.exit(main())
