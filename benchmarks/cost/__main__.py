"""Measure what a regularized step costs, and write it to the README.

    python -m benchmarks.cost             # an hour on two CPU cores: step_cost, zero_cost and scale_cost
    python -m benchmarks.cost --quick --readme /tmp/copy.md    # tiny models, to see that everything runs
    python -m benchmarks.cost --only-readme                    # update the README from the newest results

Run nothing else on the machine meanwhile. A run that was interrupted continues where it stopped. The text goes between the
lines ``<!-- cost -->`` and ``<!-- end -->`` of the README.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.common.results import QUICK, RESULTS, ROOT, between_marks, link_from_root, newest
from benchmarks.cost import step_tables, zero_cost

SCRIPTS = ("step_cost", "zero_cost", "scale_cost")


def newest_files(results: Path) -> dict[str, Path]:
    """The newest JSON file of each script."""
    return {script: newest(script.replace("_", "-"), results) for script in SCRIPTS}


def section(files: dict[str, Path]) -> str:
    """The README's text about cost, made of the three results."""
    found: dict[str, Any] = {script: json.loads(file.read_text(encoding="utf-8")) for script, file in files.items()}
    links = {script: link_from_root(file) for script, file in files.items()}
    words, table = step_tables.for_readme(found["step_cost"])
    return f"""{words} ([all figures]({links["step_cost"]}), [how it grows]({links["scale_cost"]}), `make bench`):

{table}

Under ZeRO on two CPU ranks {zero_cost.for_readme(found["zero_cost"]["rows"])}; each rank keeps its partition of one gradient
(4/N bytes per fp32 parameter), and stages 1 and 2 gather the weights once more ([all figures]({links["zero_cost"]}))."""


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.cost", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny models; the results go to runs/quick")
    parser.add_argument("--only-readme", action="store_true", help="measure nothing")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    args = parser.parse_args()
    for script in () if args.only_readme else SCRIPTS:
        if script == "zero_cost" and find_spec("deepspeed") is None:
            print("left out: zero_cost, DeepSpeed is not installed here (the extra [deepspeed])")
            continue
        command = [sys.executable, "-m", f"benchmarks.cost.{script}", *(["--quick"] if args.quick else [])]
        subprocess.run(command, check=True, cwd=ROOT)
    text = args.readme.read_text(encoding="utf-8")
    files = newest_files(QUICK if args.quick else RESULTS)
    args.readme.write_text(between_marks(text, "cost", section(files)), encoding="utf-8")
    print(f"written to {args.readme}")


if __name__ == "__main__":
    main()
