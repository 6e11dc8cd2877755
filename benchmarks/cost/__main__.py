"""Measure what a regularized step costs, and write it to the README and the site.

    python -m benchmarks.cost             # three quarters of an hour on two CPU cores: step_cost and
    zero_cost
    python -m benchmarks.cost --quick     # tiny models, to see that everything runs

Run nothing else on the machine meanwhile. A run that was interrupted continues where it stopped.
benchmarks/pages.py writes the newest figures to the pages.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib.util import find_spec

from benchmarks import pages
from benchmarks.common.results import ROOT

SCRIPTS = ("step_cost", "zero_cost")


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.cost", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny models; the results go to no page")
    args = parser.parse_args()
    for script in SCRIPTS:
        if script == "zero_cost" and find_spec("deepspeed") is None:
            print("left out: zero_cost, DeepSpeed is not installed here (the extra [deepspeed])")
            continue
        command = [sys.executable, "-m", f"benchmarks.cost.{script}", *(["--quick"] if args.quick else [])]
        subprocess.run(command, check=True, cwd=ROOT)
    if not args.quick:
        pages.write()
        print("written to README.md and docs/")


if __name__ == "__main__":
    main()
