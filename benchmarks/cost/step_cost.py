"""What does a regularized step cost, compared with two gradients and one step, and with other optimizers?

    python -m benchmarks.cost.step_cost                # 10 M and 124 M parameters
    python -m benchmarks.cost.step_cost --quick        # tiny models, to see that everything runs
    python -m benchmarks.cost.step_cost --cells "124 M float32 x4" --variants base floor gradreg

The variants, which take one step each in turn:

- ``base``               AdamW, one gradient
- ``floor``              two gradients and one AdamW step, the least that a second gradient can cost
- ``GradRegOptimizer``   around AdamW, with its defaults and with ``every=4``
- the installed optimizers of :mod:`benchmarks.cost.peers`

All variants step the same weights and share one AdamW state; the cost depends on neither. A cell of the table
is a size, a dtype and an accumulation. The script writes each cell to the result as soon as it is measured. A
run that was interrupted continues with the next cell, unless the commit has changed or ``--fresh`` is given.
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.common.arguments import add_output, at_least, require_match
from benchmarks.common.results import Record, todays
from benchmarks.cost.measuring import keep_freed_memory
from benchmarks.cost.peers import missing, present
from benchmarks.cost.rounds import measured
from benchmarks.cost.step_tables import document, table
from benchmarks.cost.subject import Cell, Subject
from benchmarks.cost.transformer import GPT2_VOCABULARY, VOCABULARY
from benchmarks.cost.variants import OURS, variants


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


def measure(cell: Cell, *, wanted: list[str] | None, seconds: float, device: torch.device) -> dict[str, Any]:
    """The figures of one cell: of base, floor, and variants whose names contain a string of ``wanted``."""
    subject = Subject(cell, device)
    parts = (*wanted, "base", "floor") if wanted else ("",)
    steps = {name: step for name, step in variants(subject).items() if any(part in name for part in parts)}
    figures = measured(subject, steps, seconds=seconds, title=cell.name)
    return {"settings": asdict(cell), "parameters": cell.parameters, **figures, "missing": missing()}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny models")
    tokens = at_least(256, multiple_of=256)
    parser.add_argument("--tokens", type=tokens, default=512, help="of a micro-batch; a multiple of 256")
    parser.add_argument("--cells", nargs="+", help="measure the cells whose names contain one of these")
    parser.add_argument("--variants", nargs="+", help="besides base and floor, those with such names")
    parser.add_argument("--minutes", type=float, default=12.0, help="for all cells, of four rounds at least")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--fresh", action="store_true", help="measure again what the file has")
    add_output(parser, "step-cost")
    args = parser.parse_args()
    cells = matrix(quick=args.quick, tokens=args.tokens)
    require_match(parser, "--cells", args.cells, (cell.name for cell in cells))
    require_match(parser, "--variants", args.variants, ["base", "floor", *OURS, *present()])
    return args


def main() -> None:
    args = parse_arguments()
    keep_freed_memory()
    # It is low in bf16 on random tokens.
    warnings.filterwarnings("ignore", "Gradient regularization: the self-check")
    output = args.output or todays("step-cost", quick=args.quick)
    record = Record(output.with_suffix(".json"), fresh=args.fresh)
    cells = matrix(quick=args.quick, tokens=args.tokens)
    cells = [cell for cell in cells if not args.cells or any(part in cell.name for part in args.cells)]
    todo = [cell for cell in cells if not record.has(cell.name, asdict(cell))]
    for name, reason in missing().items():
        print(f"left out: {name}: {reason}")
    print(f"{len(todo)} of {len(cells)} cells to measure")
    seconds, device = 60 * args.minutes / len(cells), torch.device(args.device)
    for cell in todo:
        record.keep(cell.name, measure(cell, wanted=args.variants, seconds=seconds, device=device))
        output.with_suffix(".md").write_text(document(record.parts), encoding="utf-8")
        print(table(record.parts[cell.name]))
    print(f"written to {output}.md and .json")


if __name__ == "__main__":
    main()
