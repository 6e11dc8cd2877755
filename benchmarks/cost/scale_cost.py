"""How does the cost of regularization grow with the model, the batch, the accumulation and the number of ranks?

    python -m benchmarks.cost.scale_cost            # about 15 minutes on two CPU cores; 500 M parameters need 16 GB
    python -m benchmarks.cost.scale_cost --quick    # tiny models, to see that everything runs

Four series, in each of which one quantity varies: parameters (1 M to 500 M, random weights), tokens of a step (128 to 4096),
micro-batches (1 to 8), and ranks (DDP and ZeRO-2 over gloo). A regularized step and its baseline, two gradients and one
AdamW step, are timed in turn. The document also holds what a 70 B model on 64 GPUs would pay, by the formulas of
:mod:`benchmarks.cost.zero_bytes`. A run that was interrupted continues after the series that it has finished.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from benchmarks.common.arguments import require_match
from benchmarks.common.results import same_commit, stamp, todays
from benchmarks.common.tables import markdown_table
from benchmarks.cost import zero_bytes, zero_cost
from benchmarks.cost.measuring import keep_freed_memory, quartiles, timed
from benchmarks.cost.transformer import VOCABULARY, Transformer
from benchmarks.cost.variants import Cell, Subject, variants
from gradreg_optim import GradRegOptimizer

OURS = "GradRegOptimizer"
CPU = torch.device("cpu")
SIZES = ((4, 128), (12, 256), (12, 448), (12, 896), (16, 1600))
"""Layers and widths of 1.3, 10.5, 31, 119 and 498 M parameters."""
BYTES_PER_PARAMETER = 36
"""24 for weights, two moments, two gradients and the copy of the weights; the rest for activations and heap gaps."""


@dataclass(frozen=True)
class Point:
    """One measured ratio, with its quartiles, at the value ``x`` of the quantity that the series varies."""

    series: str
    x: float
    variant: str
    seconds: float
    low: float
    ratio: float
    high: float


def point(series: str, x: float, variant: str, seconds: list[float], floor: list[float]) -> Point:
    """Median and quartiles of the ratios within rounds."""
    low, ratio, high = quartiles([own / least for own, least in zip(seconds, floor, strict=True)])
    return Point(series, x, variant, quartiles(seconds)[1], low, ratio, high)


def in_turn(
    steps: dict[str, Callable[[], Any]], *, rounds: int, before: Callable[[], Any] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each step in each round, after one round of warm-up. ``before`` is called before each step."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            before()
            seconds = timed(step, CPU)
            if number:
                times[name].append(seconds)
    return times


def of_cells(series: str, cells: dict[float, Cell], *, rounds: int) -> list[Point]:
    """The points of a series that runs in one process."""
    points = []
    for x, cell in tqdm(cells.items(), desc=series):
        if cell.parameters * BYTES_PER_PARAMETER > available_memory():
            tqdm.write(f"left out: {cell.parameters / 1e6:.0f} M parameters need more memory than there is")
            continue
        subject = Subject(cell, CPU)
        made = variants(subject, cell, peers=False)
        times = in_turn({name: made[name] for name in ("floor", OURS)}, rounds=rounds)
        points.append(point(series, x, OURS, times[OURS], times["floor"]))
    return points


def available_memory() -> int:
    """Bytes available for new allocations; unlimited where the system does not say."""
    file = Path("/proc/meminfo")
    if not file.exists():
        return sys.maxsize
    lines = file.read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def of_ddp(counts: list[int], cell: Cell, *, rounds: int) -> list[Point]:
    """The points of DistributedDataParallel, in which every rank has a micro-batch of its own."""
    points = []
    for ranks in tqdm(counts, desc="DDP"):
        context = mp.get_context("spawn")
        queue = context.Queue()
        mp.spawn(ddp_rank, args=(ranks, free_port(), cell, rounds, queue), nprocs=ranks, join=True)
        times = queue.get(timeout=10)
        points.append(point("ranks", ranks, "DDP", times["regularized"], times["floor"]))
    return points


def ddp_rank(rank: int, ranks: int, port: int, cell: Cell, rounds: int, queue: Any) -> None:
    """Run one rank; rank 0 puts the seconds of every round into ``queue``."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks, timeout=timedelta(minutes=5))
    torch.manual_seed(0)
    model = DistributedDataParallel(Transformer(layers=cell.layers, width=cell.width, length=cell.length))
    batch = torch.randint(VOCABULARY, (cell.tokens // cell.length, cell.length))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    wrapper = GradRegOptimizer(optimizer)

    def closure() -> torch.Tensor:
        model.zero_grad()
        loss = model(batch)
        loss.backward()
        return loss

    def floor() -> None:
        closure()
        closure()
        optimizer.step()

    steps: dict[str, Callable[[], Any]] = {"floor": floor, "regularized": lambda: wrapper.step(closure)}
    times = in_turn(steps, rounds=rounds, before=dist.barrier)
    if rank == 0:
        queue.put(times)
    dist.barrier()
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def of_zero(counts: list[int], cell: Cell, *, rounds: int) -> list[Point]:
    """The points of ZeRO-2; none if DeepSpeed is not installed."""
    if find_spec("deepspeed") is None:
        tqdm.write("left out: ZeRO-2, DeepSpeed is not installed here")
        return []
    points = []
    for ranks in tqdm(counts, desc="ZeRO-2"):
        args = zero_cost.parse_arguments(["--stages", "2", "--precisions", "float32", "--ranks", str(ranks)])
        args.layers, args.width, args.length, args.rounds = cell.layers, cell.width, cell.length, rounds
        args.batch = cell.tokens // cell.length
        seconds = zero_cost.run(args)["float32 stage 2"][0]["seconds"]
        floor = [2 * window + step for window, step in zip(seconds["window"], seconds["step"], strict=True)]
        points.append(point("ranks", ranks, "ZeRO-2", seconds["regularized"], floor))
    return points


def series(*, quick: bool) -> dict[str, Callable[[], list[Point]]]:
    """The series by name, each as a function that measures it."""
    sizes = ((1, 64), (2, 64)) if quick else SIZES
    layers, width = sizes[0] if quick else (12, 256)
    length, rounds = (16, 3) if quick else (256, 8)
    tokens = (16, 32) if quick else (128, 256, 512, 1024, 2048, 4096)
    accumulation = (1, 2) if quick else (1, 2, 4, 8)
    usual = 2 * length

    def cell(*, layers: int = layers, width: int = width, tokens: int = usual, accumulation: int = 1) -> Cell:
        return Cell(layers, width, VOCABULARY, tokens, min(tokens, length), "float32", accumulation)

    by_size = {made.parameters: made for made in (cell(layers=depth, width=breadth) for depth, breadth in sizes)}
    by_tokens = {count: cell(tokens=count) for count in tokens}
    by_accumulation = {count: cell(accumulation=count) for count in accumulation}
    return {
        "parameters": lambda: of_cells("parameters", by_size, rounds=rounds),
        "tokens": lambda: of_cells("tokens", by_tokens, rounds=rounds),
        "micro-batches": lambda: of_cells("micro-batches", by_accumulation, rounds=rounds),
        "ranks, DDP": lambda: of_ddp([1, 2] if quick else [1, 2, 4], cell(), rounds=rounds),
        "ranks, ZeRO-2": lambda: of_zero([2] if quick else [2, 4], cell(), rounds=rounds),
    }


def picture(points: list[Point], file: Path) -> None:
    """All series side by side; a black line marks the baseline."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(found.series for found in points))
    figure, axes = plt.subplots(1, len(names), figsize=(3.2 * len(names), 3.2), sharey=True, squeeze=False)
    labels = dict.fromkeys(found.variant for found in points)
    colours = dict(zip(labels, ("#0072b2", "#d55e00", "#009e73"), strict=False))
    for axis, name in zip(axes[0], names, strict=True):
        axis.axhline(1.0, color="black", linewidth=1.5)
        for variant, colour in colours.items():
            own = [found for found in points if (found.series, found.variant) == (name, variant)]
            if own:
                spread = [[p.ratio - p.low for p in own], [p.high - p.ratio for p in own]]
                xs, ys = [p.x for p in own], [p.ratio for p in own]
                axis.errorbar(xs, ys, spread, color=colour, marker="o", markersize=4, capsize=2, label=variant)
        ticks = sorted({found.x for found in points if found.series == name})
        axis.set_xscale("log")
        axis.set_xticks(ticks, [f"{x / 1e6:.3g} M" if name == "parameters" else f"{x:.0f}" for x in ticks], fontsize=8)
        axis.minorticks_off()
        axis.set_xlabel(name)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, loc="upper right")
    axes[0][0].set_ylabel("relative time of a regularized step")
    axes[0][0].set_title("black: two gradients and one AdamW step", fontsize=8, loc="left")
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    plt.close(figure)


HOW = """The time of a regularized step relative to two gradients and one AdamW step, one of each in turn; medians and
quartiles of the ratio. float32, AdamW. Unless a series varies it: 10.5 M parameters, one micro-batch of 512 tokens. Ranks
are processes with one thread and 512 tokens each, over gloo; on a machine with fewer cores than ranks, they share cores."""


def document(points: list[Point], stamped: dict[str, str], image: str) -> str:
    """The document."""
    rows = [
        [
            p.series,
            f"{p.x / 1e6:.1f} M" if p.series == "parameters" else f"{p.x:.0f}",
            p.variant,
            f"{p.seconds:.3f}",
            f"{p.ratio:.3f} ({p.low:.3f} to {p.high:.3f})",
        ]
        for p in points
    ]
    parts = [
        "# How the cost grows",
        HOW,
        "\n".join(f"- {name}: {value}" for name, value in stamped.items()),
        f"![relative time of a step, by series]({image})",
        "\n".join(markdown_table(["series", "at", "variant", "seconds", "relative time"], rows)),
        zero_bytes.section(),
    ]
    return "\n\n".join(parts) + "\n"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny models")
    parser.add_argument("--series", nargs="+", help="measure the series whose names contain one of these")
    parser.add_argument("--fresh", action="store_true", help="measure again what the file has")
    parser.add_argument("--output", type=Path, help="path without suffix; default: results/<date>-scale-cost/result")
    args = parser.parse_args()
    require_match(parser, "--series", args.series, series(quick=args.quick))
    return args


def main() -> None:
    args = parse_arguments()
    keep_freed_memory()
    output = args.output or todays("scale-cost", quick=args.quick)
    output.parent.mkdir(parents=True, exist_ok=True)
    file = output.with_suffix(".json")
    stamped = stamp()
    found = json.loads(file.read_text()) if file.exists() and not args.fresh else {}
    if not found or not same_commit(found["stamp"], stamped):
        found = {"stamp": stamped, "series": {}}
    for name, measured in series(quick=args.quick).items():
        if name in found["series"] or (args.series and not any(part in name for part in args.series)):
            continue
        found["series"][name] = [vars(p) for p in measured()]
        found["stamp"] = stamp()
        file.write_text(json.dumps(found, indent=1) + "\n")
        points = [Point(**p) for made in found["series"].values() for p in made]
        picture(points, output.with_suffix(".png"))
        output.with_suffix(".md").write_text(document(points, found["stamp"], output.with_suffix(".png").name))
    print(output.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
