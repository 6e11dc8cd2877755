"""What does a regularized step cost, against the two gradients that it cannot do without, and against its peers?

    python benchmarks/step_cost.py                     # 10 M and 124 M parameters, fp32 and bf16, accumulation 1 and 4
    python benchmarks/step_cost.py --quick             # the same on models of a toy's size, to see that everything runs
    python benchmarks/step_cost.py --cells "124 M float32 x4" --variants base floor gradreg

Compared, one step of each in turn so that a noisy machine is noisy for all of them alike:

- ``base``            AdamW, one gradient
- ``floor``           two gradients and one AdamW step: what every method with a second gradient pays
- ``GradRegOptimizer``   around AdamW, as it comes, and with ``memory="lean"`` (fp32 only) and ``every=4``
- the peers of :mod:`peers` that are installed

All variants step the same weights with the same AdamW state, which no cost depends on. A cell of the matrix is a size, a
dtype and an accumulation; its figures go to ``results/<date>-step-cost.json`` as soon as it is measured, and a run that was
interrupted goes on behind them (unless the commit has changed, or ``--fresh``). The document beside it is made of that file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch
from measuring import (
    GPT2_VOCABULARY,
    RESULTS,
    VOCABULARY,
    keep_freed_memory,
    peak_bytes,
    quartiles,
    same_commit,
    stamp,
    timed,
)
from peers import PEERS, missing, present
from step_tables import document, table
from tqdm import tqdm
from variants import GRADIENTS, OURS, PERIODS, Cell, Step, Subject, variants

MIN_ROUNDS, MAX_ROUNDS = 4, 16
"""Multiples of the longest period, so that each variant takes whole ones."""

Peaks = dict[str, dict[str, int]]
"""By variant: bytes beyond the base step, ``first`` and ``usual``."""


def matrix(*, quick: bool, tokens: int) -> list[Cell]:
    """Small and GPT-2's size, fp32 and bf16, accumulation 1 and 4."""
    sizes = [(1, 64, 128), (2, 64, 128)] if quick else [(12, 256, VOCABULARY), (12, 768, GPT2_VOCABULARY)]
    tokens, length = (32, 16) if quick else (tokens, 256)
    return [
        Cell(*size, tokens, length, dtype, accumulation)
        for size in sizes
        for dtype in ("float32", "bfloat16")
        for accumulation in (1, 4)
    ]


def measure_peaks(subject: Subject, steps: dict[str, Step]) -> Peaks:
    """Peak bytes of a step of each variant beyond the base step's, with what it keeps from step to step.

    ``usual`` is the highest of a period, ``first`` that of the first step, in which precision may be checked. They are
    counted on one sequence a micro-batch, and two micro-batches where there are several: more change nothing.
    """
    subject.limit(2, sequences=1)
    peaks = {}
    for name, step in steps.items():
        if name in PEERS and PEERS[name].has_own_tensors:
            peak_bytes([step])
        subject.model.zero_grad()
        first, *others = peak_bytes([step] * (1 + PERIODS.get(name, 1)))
        peaks[name] = {"first": first, "usual": max(others)}
    subject.limit()
    return {name: {kind: peaks[name][kind] - peaks["base"][kind] for kind in peaks[name]} for name in steps}


def chosen(names: list[str], wanted: list[str] | None) -> list[str]:
    """Those of ``names`` that contain a part given in ``wanted``, besides base and floor; without ``wanted`` all."""
    return [name for name in names if not wanted or any(part in name for part in (*wanted, "base", "floor"))]


def measure(cell: Cell, *, wanted: list[str] | None, seconds: float, device: torch.device) -> dict[str, Any]:
    """The figures of one cell, in as many rounds as ``seconds`` allow."""
    subject = Subject(cell, device)
    steps = variants(subject, cell)
    steps = {name: steps[name] for name in chosen(list(steps), wanted)}
    optimizer = subject.adamw(subject.parameters)
    subject.closure()
    optimizer.step()  # makes the state that all share
    peaks = measure_peaks(subject, steps)  # and warms all of them up
    one_round = round_seconds(list(steps), timed(subject.closure, device), timed(optimizer.step, device))
    rounds = affordable(one_round, seconds)
    tqdm.write(f"{cell.name}: {rounds} rounds, about {rounds * one_round:.0f} s")
    times: dict[str, list[float]] = {name: [] for name in steps}
    gradients: dict[str, list[float]] = {name: [] for name in steps}
    for _ in tqdm(range(rounds), desc=cell.name, leave=False):
        for name, step in steps.items():
            before = subject.gradients
            times[name].append(timed(step, device))
            gradients[name].append(round(subject.gradients - before, 6))
    weights = cell.parameters * getattr(torch, cell.dtype).itemsize
    return {
        "stamp": stamp(),
        "settings": asdict(cell),
        "parameters": cell.parameters,
        "rounds": rounds,
        "rows": summarise(times, gradients, peaks, weights),
        "seconds": times,
        "gradients": gradients,
        "peaks": peaks,
        "missing": missing(),
    }


def summarise(
    times: dict[str, list[float]], gradients: dict[str, list[float]], peaks: Peaks, weights: int
) -> dict[str, dict[str, float]]:
    """The figures of the tables; ``weights`` are the bytes of one copy of the weights."""
    rows = {}
    for name, seconds in times.items():
        ratios = [own / floor for own, floor in zip(seconds, times["floor"], strict=True)]
        rows[name] = {
            "gradients": statistics.mean(gradients[name]),
            **dict(zip(("seconds_low", "seconds", "seconds_high"), over_kinds(seconds, gradients[name]), strict=True)),
            **dict(zip(("to_floor_low", "to_floor", "to_floor_high"), over_kinds(ratios, gradients[name]), strict=True)),
            "copies_beyond_base": peaks[name]["usual"] / weights,
            "copies_beyond_base_first": peaks[name]["first"] / weights,
        }
    return rows


def over_kinds(values: list[float], kinds: list[float]) -> tuple[float, ...]:
    """Quartiles of a quantity that depends on a step's kind (its number of gradients): those of each kind, by its share.

    >>> over_kinds([2.0, 1.0, 1.0, 1.2], [2, 1, 1, 1])
    (1.25, 1.25, 1.325)
    """
    parts = []
    for kind in sorted(set(kinds)):
        own = [value for value, other in zip(values, kinds, strict=True) if other == kind]
        parts.append([quartile * len(own) / len(values) for quartile in quartiles(own)])
    return tuple(sum(column) for column in zip(*parts, strict=True))


def round_seconds(names: list[str], gradient: float, step: float) -> float:
    """About how long a round takes in which a gradient and a base step take so long."""
    return sum(GRADIENTS.get(name, 2.0) for name in names) * gradient + len(names) * step


def affordable(one_round: float, seconds: float) -> int:
    """The rounds that fit into ``seconds``: a multiple of the longest period, within bounds."""
    return max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds / one_round) // MIN_ROUNDS * MIN_ROUNDS))


def plan(cells: list[Cell], *, wanted: list[str] | None, seconds: float, device: torch.device) -> float:
    """The seconds that ``cells`` are going to take, by one gradient and one AdamW step of each size and dtype."""
    found: dict[tuple[int, str], tuple[float, float]] = {}
    total, names = 0.0, chosen(["base", "floor", *OURS, *present()], wanted)
    for cell in cells:
        key = (cell.parameters, cell.dtype)
        if key not in found:
            subject = Subject(cell, device)
            subject.limit(1)
            optimizer = subject.adamw(subject.parameters)
            found[key] = [(timed(subject.closure, device), timed(optimizer.step, device)) for _ in range(2)][1]
        gradient, step = found[key]
        one_round = round_seconds(names, gradient * cell.accumulation, step)
        peaks = 2.5 * round_seconds(names, gradient * min(2, cell.accumulation) / 2, step)
        total += affordable(one_round, seconds) * one_round + peaks
    return total


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="models of a toy's size")
    parser.add_argument("--tokens", type=int, default=512, help="in a micro-batch, a multiple of 256")
    parser.add_argument("--cells", nargs="+", help="parts of the names of the cells to measure")
    parser.add_argument("--variants", nargs="+", help="parts of the names of variants, besides base and floor")
    parser.add_argument("--minutes", type=float, default=12.0, help="for all cells; each takes at least four rounds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--fresh", action="store_true", help="measure cells again that the file has")
    parser.add_argument("--output", type=Path, help="path without suffix; default: results/<date>-step-cost")
    return parser.parse_args()


def is_measured(cell: Cell, found: dict[str, Any] | None) -> bool:
    """Whether ``found`` are the figures of this cell, from this commit."""
    return found is not None and found["settings"] == asdict(cell) and same_commit(found["stamp"], stamp())


def main() -> None:
    args = parse_arguments()
    keep_freed_memory()
    warnings.filterwarnings("ignore", "Gradient regularization: the self-check")  # random tokens in bf16: it is right
    kind = "-quick" if args.quick else ""
    output = args.output or RESULTS / f"{date.today()}-step-cost{kind}"
    device = torch.device(args.device)
    file = output.with_suffix(".json")
    cells = json.loads(file.read_text()) if file.exists() and not args.fresh else {}
    wanted = matrix(quick=args.quick, tokens=args.tokens)
    wanted = [cell for cell in wanted if not args.cells or any(part in cell.name for part in args.cells)]
    todo = [cell for cell in wanted if not is_measured(cell, cells.get(cell.name))]
    budget = 60 * args.minutes / len(wanted)
    minutes = plan(todo, wanted=args.variants, seconds=budget, device=device) / 60
    for name, reason in missing().items():
        print(f"left out: {name}: {reason}")
    print(f"{len(todo)} of {len(wanted)} cells to measure, about {minutes:.0f} minutes")
    output.parent.mkdir(parents=True, exist_ok=True)
    for cell in todo:
        cells[cell.name] = measure(cell, wanted=args.variants, seconds=budget, device=device)
        file.write_text(json.dumps(cells, indent=1) + "\n")
        output.with_suffix(".md").write_text(document(cells))
        print(table(cells[cell.name]))
    print(f"written to {output}.md and .json")


if __name__ == "__main__":
    main()
