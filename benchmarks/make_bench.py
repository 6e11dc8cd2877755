"""Measure again what the README says about cost, and write it there.

    python benchmarks/make_bench.py             # an hour on two CPU cores: step_cost, zero_cost and scale_cost
    python benchmarks/make_bench.py --quick --readme /tmp/copy.md    # toys, to see that everything runs
    python benchmarks/make_bench.py --only-readme                    # the README from the results that are there

Leave the machine alone meanwhile. What was interrupted goes on where it stopped. The README gets what stands between
``<!-- cost -->`` and ``<!-- end -->``, from the newest results.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import zero_cost
from measuring import RESULTS, ROOT, between_marks
from step_tables import for_readme

SCRIPTS = ("step_cost", "zero_cost", "scale_cost")


def newest(script: str, results: Path, *, quick: bool) -> Path:
    """The newest JSON file of ``script``.

    Raises:
        FileNotFoundError: it has not run yet.
    """
    name = script.replace("_", "-") + ("-quick" if quick else "")
    found = sorted(results.glob(f"*-{name}.json"))
    if not found:
        raise FileNotFoundError(f"{results} must have a file *-{name}.json: run benchmarks/{script}.py first")
    return found[-1]


def section(files: dict[str, Path]) -> str:
    """What the README says about cost, out of the three results."""
    found: dict[str, Any] = {script: json.loads(file.read_text(encoding="utf-8")) for script, file in files.items()}
    links = {script: f"benchmarks/results/{file.with_suffix('.md').name}" for script, file in files.items()}
    words, table = for_readme(found["step_cost"])
    return f"""{words}
([all figures]({links["step_cost"]}), [how it grows]({links["scale_cost"]}), `make bench`):

{table}

Under ZeRO on two CPU ranks {zero_cost.for_readme(found["zero_cost"]["rows"])}; each rank keeps its partition of one gradient
(4/N bytes per fp32 parameter), and stages 1 and 2 gather the weights once more ([all figures]({links["zero_cost"]}))."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="models of a toy's size, in files of their own")
    parser.add_argument("--only-readme", action="store_true", help="measure nothing")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    args = parser.parse_args()
    for script in () if args.only_readme else SCRIPTS:
        if script == "zero_cost" and find_spec("deepspeed") is None:
            print("left out: zero_cost, DeepSpeed is not installed here (the extra [deepspeed])")
            continue
        command = [sys.executable, str(Path(__file__).with_name(f"{script}.py")), *(["--quick"] if args.quick else [])]
        subprocess.run(command, check=True)
    files = {script: newest(script, RESULTS, quick=args.quick) for script in SCRIPTS}
    text = args.readme.read_text(encoding="utf-8")
    args.readme.write_text(between_marks(text, "cost", section(files)), encoding="utf-8")
    print(f"written to {args.readme}")


if __name__ == "__main__":
    main()
