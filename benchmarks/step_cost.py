"""What does a regularized step cost, against the two gradients that it cannot do without?

    python benchmarks/step_cost.py                     # 10 M parameters, 2048 tokens, float32
    python benchmarks/step_cost.py --layers 12 --width 768 --dtype bfloat16 --accumulation 4

Compared, one step of each in turn so that a noisy machine is noisy for all of them alike:

- ``base``      AdamW, one gradient
- ``floor``     two gradients and one AdamW step: what every method with a second gradient pays
- ``gradreg``   GradRegOptimizer around AdamW
- ``SAM``       the SAM of pytorch_optimizer around AdamW, the nearest relative

The table gives the median time with its quartiles, its ratio to the floor (median over rounds of the ratio within a
round), and the peak memory of a step beyond the base step, in units of one weight copy. It is written to
``results/<date>-step-cost.md``, with a JSON file of the same name that holds every figure.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gradreg_optim import GradRegOptimizer

RESULTS = Path(__file__).parent / "results"
VOCABULARY = 4096


class Transformer(nn.Module):
    """A causal language model out of torch's own layers."""

    def __init__(self, *, layers: int, width: int, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        nn.init.normal_(self.embedding.weight, std=0.02)  # as language models do; it is the output layer too
        layer = nn.TransformerEncoderLayer(
            width, width // 64, 4 * width, dropout=0.0, batch_first=True, norm_first=True, activation="gelu"
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.layers(self.embedding(tokens), mask=self.mask, is_causal=True)
        logits = hidden @ self.embedding.weight.T
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def make_steps(args: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """One closed step function per variant, each on a model of its own with the same weights and data."""
    torch.manual_seed(args.seed)
    dtype = getattr(torch, args.dtype)
    device = torch.device(args.device)
    batches = torch.randint(VOCABULARY, (args.accumulation, args.batch, args.length), device=device)

    def build() -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], Tensor]]:
        torch.manual_seed(args.seed)
        model = Transformer(layers=args.layers, width=args.width, length=args.length).to(device, dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

        def closure() -> Tensor:
            optimizer.zero_grad()
            for tokens in batches:
                loss = model(tokens) / args.accumulation
                loss.backward()
            return loss

        return model, optimizer, closure

    def base() -> Callable[[], Any]:
        _, optimizer, closure = build()
        return lambda: (closure(), optimizer.step())

    def floor() -> Callable[[], Any]:
        _, optimizer, closure = build()
        return lambda: (closure(), closure(), optimizer.step())

    def gradreg() -> Callable[[], Any]:
        _, optimizer, closure = build()
        wrapper = GradRegOptimizer(optimizer)
        return lambda: wrapper.step(closure)

    def sam() -> Callable[[], Any]:
        from pytorch_optimizer import SAM

        model, _, closure = build()
        optimizer = SAM(list(model.parameters()), base_optimizer=torch.optim.AdamW, rho=0.05, lr=1e-5)

        def step() -> None:
            closure()
            optimizer.first_step(zero_grad=True)
            closure()
            optimizer.second_step(zero_grad=True)

        return step

    return {"base": base(), "floor": floor(), "gradreg": gradreg(), "SAM": sam()}


def measure_times(steps: dict[str, Callable[[], Any]], *, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds per step, ``rounds`` of each variant, interleaved; the first round warms up and is not counted."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in tqdm(range(rounds + 1), desc="rounds"):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device.type != "cpu":
                torch.accelerator.synchronize()
            if round_number:
                times[name].append(time.perf_counter() - start)
    return times


def measure_peaks(steps: dict[str, Callable[[], Any]]) -> dict[str, int]:
    """Peak bytes beyond those alive before the step: the running sum of everything the allocators hand out and take back."""
    peaks = {}
    for name, step in steps.items():
        with torch.profiler.profile(profile_memory=True) as profiler:
            step()
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        peaks[name] = max(itertools.accumulate(changes), default=0)
    return peaks


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def summarise(times: dict[str, list[float]], peaks: dict[str, int], weight_bytes: int) -> dict[str, dict[str, float]]:
    """The table's figures."""
    rows = {}
    for name, seconds in times.items():
        low, median, high = quartiles(seconds)
        ratios = quartiles([own / floor for own, floor in zip(seconds, times["floor"], strict=True)])
        rows[name] = {
            "seconds": median,
            "seconds_low": low,
            "seconds_high": high,
            "to_floor": ratios[1],
            "to_floor_low": ratios[0],
            "to_floor_high": ratios[2],
            "weight_copies_beyond_base": (peaks[name] - peaks["base"]) / weight_bytes,
        }
    return rows


def stamp() -> dict[str, str]:
    """Hardware, versions, commit and command, without which a figure means nothing."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    processor = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()}, CPU"
    return {
        "date": date.today().isoformat(),
        "hardware": f"{processor}, {torch.get_num_threads()} threads",
        "load": f"{os.getloadavg()[0]:.1f} processes at the end",
        "versions": f"torch {torch.__version__}, Python {platform.python_version()}",
        "commit": commit.stdout.strip() or "unknown",
        "command": f"python benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}".strip(),
    }


def markdown(rows: dict[str, dict[str, float]], title: str, stamped: dict[str, str]) -> str:
    """The dated document: what was measured, on what, and the table."""
    table = ["| variant | seconds per step | × floor | weight copies beyond base |", "|---|---|---|---|"]
    table += [
        f"| {name} | {row['seconds']:.3f} ({row['seconds_low']:.3f} to {row['seconds_high']:.3f}) "
        f"| {row['to_floor']:.3f} ({row['to_floor_low']:.3f} to {row['to_floor_high']:.3f}) "
        f"| {row['weight_copies_beyond_base']:.2f} |"
        for name, row in rows.items()
    ]
    facts = [f"- {name}: {value}" for name, value in stamped.items()]
    return "\n".join(["# Cost of a regularized step", "", title, "", *facts, "", *table, ""])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=256, help="a multiple of 64")
    parser.add_argument("--batch", type=int, default=8, help="sequences in a micro-batch")
    parser.add_argument("--length", type=int, default=256, help="tokens in a sequence")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches in a step")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / f"{date.today()}-step-cost", help="path without suffix")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    steps = make_steps(args)
    model = Transformer(layers=args.layers, width=args.width, length=args.length)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    times = measure_times(steps, rounds=args.rounds, device=torch.device(args.device))
    peaks = measure_peaks(steps)
    rows = summarise(times, peaks, parameters * getattr(torch, args.dtype).itemsize)
    title = (
        f"{parameters / 1e6:.1f} M parameters, {args.batch * args.length * args.accumulation} tokens a step in "
        f"{args.accumulation} micro-batch(es), {args.dtype}, AdamW. Median and quartiles of {args.rounds} rounds."
    )
    stamped = stamp()
    document = markdown(rows, title, stamped)
    print(f"\n{document}")
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    report = {
        "stamp": stamped,
        "settings": settings,
        "parameters": parameters,
        "rows": rows,
        "seconds": times,
        "peaks": peaks,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.with_suffix(".md").write_text(document)
    args.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {args.output}.md and .json")


if __name__ == "__main__":
    main()
