"""What does a regularized step cost, compared with two gradients and one step, and with other optimizers of this kind?

    python -m benchmarks.cost.step_cost                # 10 M and 124 M parameters, fp32 and bf16, accumulation 1 and 4
    python -m benchmarks.cost.step_cost --quick        # tiny models, to see that everything runs
    python -m benchmarks.cost.step_cost --cells "124 M float32 x4" --variants base floor gradreg

The variants, which take one step each in turn:

- ``base``               AdamW, one gradient
- ``floor``              two gradients and one AdamW step, the least that a method with a second gradient can cost
- ``GradRegOptimizer``   around AdamW, with its defaults, with ``every=4`` and with ``fraction=1/4``
- the installed optimizers of :mod:`benchmarks.cost.peers`

All variants step the same weights and share one AdamW state; the cost depends on neither. A cell of the table is a size, a
dtype and an accumulation. The script writes each cell to the result as soon as it is measured. A run that was interrupted
continues with the next cell, unless the commit has changed or ``--fresh`` is given.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.common.arguments import at_least, require_match
from benchmarks.common.results import same_commit, stamp, todays
from benchmarks.cost.measuring import keep_freed_memory, peak_bytes, quartiles, timed
from benchmarks.cost.peers import PEERS, missing, present
from benchmarks.cost.step_tables import document, table
from benchmarks.cost.transformer import GPT2_VOCABULARY, VOCABULARY
from benchmarks.cost.variants import GRADIENTS, OURS, PERIODS, Cell, Step, Subject, variants

MIN_ROUNDS, MAX_ROUNDS = 4, 16
"""Multiples of the longest period, so that every variant takes whole periods."""

Peaks = dict[str, dict[str, int]]
"""By variant: bytes beyond the base step, of the first step and of the usual one."""


def matrix(*, quick: bool, tokens: int) -> list[Cell]:
    """The cells: a small model and one of GPT-2's size, fp32 and bf16, accumulation 1 and 4."""
    sizes = [(1, 64, 128), (2, 64, 128)] if quick else [(12, 256, VOCABULARY), (12, 768, GPT2_VOCABULARY)]
    tokens, length = (32, 16) if quick else (tokens, 256)
    return [
        Cell(*size, tokens, length, dtype, accumulation)
        for size in sizes
        for dtype in ("float32", "bfloat16")
        for accumulation in (1, 4)
    ]


def measure_peaks(subject: Subject, steps: dict[str, Step]) -> Peaks:
    """Peak bytes of a step of each variant beyond those of the base step, including what it keeps between steps.

    ``usual`` is the maximum over a period. ``first`` is the first step, which may check the precision. Both are counted with
    one sequence a micro-batch, and with two micro-batches where the cell has several; more would change nothing.
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
    """Those of ``names`` that contain a string of ``wanted``, and base and floor; all of them without ``wanted``."""
    return [name for name in names if not wanted or any(part in name for part in (*wanted, "base", "floor"))]


def measure(cell: Cell, *, wanted: list[str] | None, seconds: float, device: torch.device) -> dict[str, Any]:
    """The figures of one cell, from as many rounds as fit into ``seconds``."""
    subject = Subject(cell, device)
    steps = variants(subject, cell)
    steps = {name: steps[name] for name in chosen(list(steps), wanted)}
    optimizer = subject.adamw(subject.parameters)
    subject.closure()
    optimizer.step()  # makes the state that all variants share
    peaks = measure_peaks(subject, steps)  # warms all of them up as well
    one_round = round_seconds(list(steps), timed(subject.closure, device), timed(optimizer.step, device))
    rounds = affordable(one_round, seconds)
    tqdm.write(f"{cell.name}: {rounds} rounds, about {rounds * one_round:.0f} s")
    times, gradients = in_turn(steps, subject, rounds, device, cell.name)
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


def in_turn(
    steps: dict[str, Step], subject: Subject, rounds: int, device: torch.device, title: str
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds and gradients of each variant's steps, one step of each in every round."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    gradients: dict[str, list[float]] = {name: [] for name in steps}
    for _ in tqdm(range(rounds), desc=title, leave=False):
        for name, step in steps.items():
            before = subject.gradients
            times[name].append(timed(step, device))
            gradients[name].append(round(subject.gradients - before, 6))
    return times, gradients


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
    """Quartiles of a quantity that depends on the kind of step: those of each kind, weighted by its frequency.

    The kind of a step is its number of gradients.

    >>> over_kinds([2.0, 1.0, 1.0, 1.5], [2, 1, 1, 1])
    (1.25, 1.25, 1.4375)
    """
    parts = []
    for kind in sorted(set(kinds)):
        own = [value for value, other in zip(values, kinds, strict=True) if other == kind]
        parts.append([quartile * len(own) / len(values) for quartile in quartiles(own)])
    return tuple(sum(column) for column in zip(*parts, strict=True))


def round_seconds(names: list[str], gradient: float, step: float) -> float:
    """An estimate of a round's seconds, from those of one gradient and one base step."""
    return sum(GRADIENTS.get(name, 2.0) for name in names) * gradient + len(names) * step


def affordable(one_round: float, seconds: float) -> int:
    """The number of rounds that fit into ``seconds``: a multiple of the longest period, within bounds."""
    return max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds / one_round) // MIN_ROUNDS * MIN_ROUNDS))


def plan(cells: list[Cell], *, wanted: list[str] | None, seconds: float, device: torch.device) -> float:
    """An estimate of the seconds for ``cells``, from one gradient and one AdamW step of each size and dtype."""
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
    parser.add_argument("--quick", action="store_true", help="tiny models")
    tokens = at_least(256, multiple_of=256)
    parser.add_argument("--tokens", type=tokens, default=512, help="of a micro-batch; a multiple of 256")
    parser.add_argument("--cells", nargs="+", help="measure the cells whose names contain one of these")
    parser.add_argument("--variants", nargs="+", help="besides base and floor, those whose names contain one of these")
    parser.add_argument("--minutes", type=float, default=12.0, help="for all cells; each takes at least four rounds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--fresh", action="store_true", help="measure again what the file has")
    parser.add_argument("--output", type=Path, help="path without suffix; default: results/<date>-step-cost/result")
    args = parser.parse_args()
    require_match(parser, "--cells", args.cells, (cell.name for cell in matrix(quick=args.quick, tokens=args.tokens)))
    require_match(parser, "--variants", args.variants, ["base", "floor", *OURS, *present()])
    return args


def is_measured(cell: Cell, found: dict[str, Any] | None) -> bool:
    """Whether ``found`` holds the figures of this cell, measured at this commit."""
    return found is not None and found["settings"] == asdict(cell) and same_commit(found["stamp"], stamp())


def main() -> None:
    args = parse_arguments()
    keep_freed_memory()
    warnings.filterwarnings("ignore", "Gradient regularization: the self-check")  # it is low in bf16 on random tokens
    output = args.output or todays("step-cost", quick=args.quick)
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
