"""Which trainers work with which version of TRL? Runs the trainers' tests in each environment and writes the
results.

    python -m benchmarks.trainers .venv-pinned/bin/python .venv/bin/python

Each argument is the interpreter of an environment in which the tests run. A trainer *works* if the tests in
``TESTS`` pass at accumulation 1 and 2. It is *refused* if the test of its refusal passes. It *fails* if any
of these tests fails. Trainers that no test runs are listed below the table, with the reason that
tests/support/trainer_kinds.py gives.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections import defaultdict
from datetime import date
from typing import Any
from xml.etree import ElementTree

from benchmarks import pages
from benchmarks.common.arguments import existing
from benchmarks.common.results import ROOT, commit, todays, write_both
from benchmarks.common.testing import cases_of, outcome_of
from benchmarks.trainers.tables import table

TESTS = ("tests/benchmarks/test_trainer_matrix.py", "tests/trainers/test_vllm_hooks.py::test_asynchronous")
PACKAGES = ("gradreg_optim", "torch", "transformers", "trl", "accelerate")
LEGEND = """✓: trains with the penalty. With the second pass at θ itself, weights and logs equal those of a
plain run bit for bit, at accumulation 1 and 2. Refused: stops with an error before the first step instead of
training without the penalty. –: this version has no such trainer. OnlineDPO, NashMD and XPO need
`attach(trainer)`, and so does AsyncGRPO, which makes its model itself; the others need only `optimizers=`.
AsyncGRPO ran with stand-ins for its vLLM server and for FlashAttention 3. Several classes are called
GRPOTrainer; GSPOTokenTrainer is that of `trl.experimental.gspo_token`."""


def run(python: str) -> dict[str, Any]:
    """The versions that ``python`` has, the outcome of each trainer, and the seconds of the tests."""
    code = "import json; from importlib.metadata import version; "
    code += f"print(json.dumps({{name: version(name) for name in {PACKAGES}}}))"
    versions = json.loads(subprocess.check_output([python, "-c", code], text=True))
    start = time.perf_counter()
    trainers = outcomes(cases_of(python, *TESTS))
    return {"versions": versions, "seconds": round(time.perf_counter() - start, 1), "trainers": trainers}


def outcomes(cases: list[ElementTree.Element]) -> dict[str, str]:
    """The outcome of each trainer that a test's name contains: works, refused, absent or fails."""
    seen: dict[str, set[str]] = defaultdict(set)
    for case in cases:
        name = re.search(r"\[.*?(\w*Trainer)", case.get("name", ""))
        if name is None:
            continue
        passed = "refused" if case.get("name", "").startswith("test_refused") else "works"
        seen[name[1]].add({"failed": "fails", "skipped": "absent", "passed": passed}[outcome_of(case)])
    return {name: found.pop() if len(found) == 1 else "fails" for name, found in seen.items()}


def not_run() -> str:
    """The trainers that no test runs, each with the reason."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from trainer_kinds import NOT_RUN

    return "\n".join(["Not run:", "", *(f"- {name}: {reason}." for name, reason in NOT_RUN.items())])


def main(argv: list[str]) -> None:
    """Run the tests, and write the result and the table of docs/trainers.md.

    Raises:
        SystemExit: a trainer fails.
    """
    parser = argparse.ArgumentParser("python -m benchmarks.trainers", description=__doc__.splitlines()[0])
    parser.add_argument("pythons", nargs="*", type=existing, default=[sys.executable], help="interpreters")
    pythons = parser.parse_args(argv).pythons
    runs = [run(python) for python in pythons]
    took = " and ".join(f"{run['seconds']:.0f} s" for run in runs)
    origin = f"{date.today()}, commit {commit()}, `make trainers`, {took}, on CPU."
    parts = ("# Trainers", LEGEND, table(runs), not_run(), origin)
    record = {"date": str(date.today()), "commit": commit(), "runs": runs}
    write_both(todays("trainers"), record, "\n\n".join(parts) + "\n")
    pages.write()
    print(table(runs))
    if any("fails" in run["trainers"].values() for run in runs):
        sys.exit("Some trainer fails.")


if __name__ == "__main__":
    main(sys.argv[1:])
