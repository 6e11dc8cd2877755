"""Which trainers work with which TRL? Runs the matrix of trainers in each environment and writes down what its tests said.

    python benchmarks/trainer_matrix.py .venv-pinned/bin/python .venv/bin/python

Each argument is an interpreter in whose environment the tests run. A trainer *works* where the tests named in ``TESTS``
passed at accumulation 1 and 2, is *refused* where the test of its refusal passed, and *fails* where any of them did not.
Trainers that are not run are listed below the table with the reason that tests/trainer_kinds.py gives.
"""

from __future__ import annotations

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

from measuring import ROOT, between_marks

TESTS = ("tests/test_trainer_matrix.py", "tests/test_vllm_hooks.py::test_asynchronous")
PACKAGES = ("gradreg_optim", "torch", "transformers", "trl", "accelerate")
MARKS = {"works": "✓", "refused": "refused", "absent": "–", "fails": "**fails**"}
LEGEND = """✓: trains with the penalty; with the second pass at θ itself, its weights and logs are those of a plain run,
bit for bit, at accumulation 1 and 2. Refused: stops with an error before the first step, instead of training without the
penalty. –: this version has no such trainer. OnlineDPO, NashMD and XPO need `attach(trainer)`, and so does AsyncGRPO, which
makes its model itself; the others need nothing but `optimizers=`. AsyncGRPO ran with stand-ins for its vLLM server and for
FlashAttention 3. Several classes are called GRPOTrainer: GSPOTokenTrainer is that of `trl.experimental.gspo_token`."""


def run(python: str) -> dict[str, Any]:
    """The versions in the environment of ``python``, the outcome for each trainer, and the seconds it took."""
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
    """For each trainer named in the tests' names: works, refused, absent or fails."""
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
    """Trainers in rows, versions in columns."""
    columns = [f"trl {run['versions']['trl']}, transformers {run['versions']['transformers']}" for run in runs]
    lines = [f"| trainer | {' | '.join(columns)} |", "|---" * (1 + len(runs)) + "|"]
    for name in runs[0]["trainers"]:
        marks = (MARKS[run["trainers"].get(name, "fails")] for run in runs)
        lines += [f"| {name} | {' | '.join(marks)} |"]
    return "\n".join(lines)


def summary(runs: list[dict[str, Any]]) -> str:
    """The same in as many rows as there are versions, for the README."""
    found = [{outcome: [] for outcome in MARKS} for _ in runs]
    for names, run in zip(found, runs, strict=True):
        for name, outcome in run["trainers"].items():
            names[outcome].append(name.removesuffix("Trainer") or name)
    lines = ["| | trains regularized | not |", "|---|---|---|"]
    for names, run in zip(found, runs, strict=True):
        failing = [f"{', '.join(names[outcome])}: {outcome}" for outcome in ("refused", "fails") if names[outcome]]
        lines += [f"| trl {run['versions']['trl']} | {', '.join(names['works'])} | {'; '.join(failing)} |"]
    return "\n".join(lines)


def in_readme(readme: str, rows: str) -> str:
    """The text of the README with ``rows`` between their marks."""
    return between_marks(readme, "trainers", rows)


def not_run() -> str:
    """The trainers that no test runs, each with the reason."""
    sys.path.insert(0, str(ROOT / "tests"))
    from trainer_kinds import NOT_RUN

    return "\n".join(["Not run:", "", *(f"- {name}: {reason}." for name, reason in NOT_RUN.items())])


def main(pythons: list[str]) -> None:
    """Run, and write ``results/trainers.md``, ``results/trainers.json`` and the table of the README."""
    runs = [run(python) for python in pythons]
    commit = subprocess.check_output(["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True).strip()
    took = " and ".join(f"{run['seconds']:.0f} s" for run in runs)
    origin = f"{date.today()}, commit {commit}, `make trainers`, {took}, on CPU."
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    parts = ("# Trainers", LEGEND, table(runs), not_run(), origin)
    (results / "trainers.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    record = {"date": str(date.today()), "commit": commit, "runs": runs}
    (results / "trainers.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    readme = ROOT / "README.md"
    readme.write_text(in_readme(readme.read_text(encoding="utf-8"), summary(runs)), encoding="utf-8")
    print(table(runs))
    if any("fails" in run["trainers"].values() for run in runs):
        sys.exit("Some trainer fails.")


if __name__ == "__main__":
    main(sys.argv[1:] or [sys.executable])
