"""Which trainers work with which version of TRL? Runs the trainers' tests in each environment and writes the results.

    python -m benchmarks.trainers .venv-pinned/bin/python .venv/bin/python

Each argument is the interpreter of an environment in which the tests run. A trainer *works* if the tests in ``TESTS`` pass
at accumulation 1 and 2. It is *refused* if the test of its refusal passes. It *fails* if any of these tests fails. Trainers
that no test runs are listed below the table, with the reason that tests/support/trainer_kinds.py gives.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from datetime import date
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks import pages
from benchmarks.common.arguments import existing
from benchmarks.common.results import ROOT, todays
from benchmarks.common.tables import markdown_table

TESTS = ("tests/benchmarks/test_trainer_matrix.py", "tests/trainers/test_vllm_hooks.py::test_asynchronous")
PACKAGES = ("gradreg_optim", "torch", "transformers", "trl", "accelerate")
MARKS = {"works": "✓", "refused": "refused", "absent": "–", "fails": "**fails**"}
LEGEND = """✓: trains with the penalty. With the second pass at θ itself, weights and logs equal those of a plain run bit for
bit, at accumulation 1 and 2. Refused: stops with an error before the first step instead of training without the penalty. –:
this version has no such trainer. OnlineDPO, NashMD and XPO need `attach(trainer)`, and so does AsyncGRPO, which makes its
model itself; the others need only `optimizers=`. AsyncGRPO ran with stand-ins for its vLLM server and for FlashAttention 3.
Several classes are called GRPOTrainer; GSPOTokenTrainer is that of `trl.experimental.gspo_token`."""


def run(python: str) -> dict[str, Any]:
    """The versions in the environment of ``python``, the outcome of each trainer, and the seconds of the tests."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    code = f"import json; from importlib.metadata import version; print(json.dumps({{n: version(n) for n in {PACKAGES}}}))"
    versions = json.loads(subprocess.check_output([python, "-c", code], text=True))
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [python, "-m", "pytest", "-q", *TESTS, f"--junitxml={report}", "-p", "no:cacheprovider"]
        subprocess.run(command, cwd=ROOT, env=environment, check=False, stdout=sys.stderr)
        cases = list(ElementTree.parse(report).iter("testcase"))
    return {"versions": versions, "seconds": round(time.perf_counter() - start, 1), "trainers": outcomes(cases)}


def outcomes(cases: list[ElementTree.Element]) -> dict[str, str]:
    """The outcome of each trainer that a test's name contains: works, refused, absent or fails."""
    seen: dict[str, set[str]] = defaultdict(set)
    for case in cases:
        name = re.search(r"\[.*?(\w*Trainer)", case.get("name", ""))
        if name is None:
            continue
        failed = case.find("failure") is not None or case.find("error") is not None
        passed = "refused" if case.get("name", "").startswith("test_refused") else "works"
        seen[name[1]].add("fails" if failed else "absent" if case.find("skipped") is not None else passed)
    return {name: found.pop() if len(found) == 1 else "fails" for name, found in seen.items()}


def table(runs: list[dict[str, Any]]) -> str:
    """One row for each trainer, one column for each version."""
    columns = [f"trl {run['versions']['trl']}, transformers {run['versions']['transformers']}" for run in runs]
    names = runs[0]["trainers"]
    rows = [[name, *(MARKS[run["trainers"].get(name, "fails")] for run in runs)] for name in names]
    return "\n".join(markdown_table(["trainer", *columns], rows))


def summary(runs: list[dict[str, Any]], document: str) -> str:
    """A link to ``document``, and one row for each version."""
    rows = []
    for run in runs:
        names: dict[str, list[str]] = {outcome: [] for outcome in MARKS}
        for name, outcome in run["trainers"].items():
            names[outcome].append(name.removesuffix("Trainer") or name)
        failing = [f"{', '.join(names[outcome])}: {outcome}" for outcome in ("refused", "fails") if names[outcome]]
        rows.append([f"trl {run['versions']['trl']}", ", ".join(names["works"]), "; ".join(failing)])
    lines = [f"What was tested, by `make trainers` ([how]({document})):", ""]
    return "\n".join(lines + markdown_table(["", "trains regularized", "not"], rows))


def not_run() -> str:
    """The trainers that no test runs, each with the reason."""
    sys.path.insert(0, str(ROOT / "tests"))
    from trainer_kinds import NOT_RUN

    return "\n".join(["Not run:", "", *(f"- {name}: {reason}." for name, reason in NOT_RUN.items())])


def main(argv: list[str]) -> None:
    """Run the tests, and write the result and the table of docs/trainers.md.

    Raises:
        SystemExit: a trainer fails.
    """
    parser = argparse.ArgumentParser("python -m benchmarks.trainers", description=__doc__.splitlines()[0])
    parser.add_argument("pythons", nargs="*", type=existing, default=[sys.executable], help="interpreters; default: this")
    pythons = parser.parse_args(argv).pythons
    runs = [run(python) for python in pythons]
    commit = subprocess.check_output(["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True).strip()
    took = " and ".join(f"{run['seconds']:.0f} s" for run in runs)
    origin = f"{date.today()}, commit {commit}, `make trainers`, {took}, on CPU."
    result = todays("trainers")
    result.parent.mkdir(parents=True, exist_ok=True)
    parts = ("# Trainers", LEGEND, table(runs), not_run(), origin)
    result.with_suffix(".md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    record = {"date": str(date.today()), "commit": commit, "runs": runs}
    result.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    pages.write()
    print(table(runs))
    if any("fails" in run["trainers"].values() for run in runs):
        sys.exit("Some trainer fails.")


if __name__ == "__main__":
    main(sys.argv[1:])
