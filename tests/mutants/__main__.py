"""Plants one fault after another in a copy of the project, and runs the tests that should find it.

    python -m tests.mutants               all faults
    python -m tests.mutants zero          those of tests/mutants/zero.py
    python -m tests.mutants zero slice    those of them whose names contain a word

Each of these files has TESTS, the tests that are run, and MUTANTS: title, file, the text that is there once, what takes its
place, and perhaps a test to run first. Exits with 1 if a fault survives, or if its text is not there exactly once.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIMEOUT = 300
"""Seconds for one test; a fault that makes ranks wait for each other counts as found."""


def run(folder: Path, tests: list[str]) -> str:
    """What ``tests`` in ``folder``, one after the other until one fails, say about the fault that was planted there."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--timeout={TIMEOUT}",
        *tests,
    ]
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    found = re.search(r"^FAILED (\S+)", done.stdout, re.MULTILINE)
    if done.returncode == 0:
        return "SURVIVED"
    return f"found by {found[1]}" if found else f"NOT TRIED: {done.stdout[-300:]}{done.stderr[-300:]}"


def main(module: str = "", *words: str) -> int:
    """Try the faults of ``module``, or of all modules; returns how many were not found."""
    missed, is_clean = 0, dict[tuple[str, ...], bool]()
    modules = [module] if module else sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name) / "project"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "build", "results", "__pycache__", "*.egg-info"))
        for planted in (importlib.import_module(f"tests.mutants.{name}") for name in modules):
            for title, file, old, new, *first in planted.MUTANTS:
                if not all(word in title for word in words):
                    continue
                begin, original = time.monotonic(), (copy / file).read_text()
                key = (planted.__name__, *first)
                if key not in is_clean:
                    is_clean[key] = run(copy, first or planted.TESTS) == "SURVIVED"
                if not is_clean[key]:
                    verdict = "NOT TRIED: its tests fail without it"
                elif original.count(old) == 1:
                    (copy / file).write_text(original.replace(old, new))
                    verdict = run(copy, [*first, *planted.TESTS])
                    (copy / file).write_text(original)
                else:
                    verdict = f"NOT PLANTED: its text is {original.count(old)} times in {file}"
                missed += not verdict.startswith("found")
                print(f"{planted.__name__}: {title}: {verdict} ({time.monotonic() - begin:.0f} s)", flush=True)
    print(f"{missed} not found")
    return missed


if __name__ == "__main__":
    sys.exit(bool(main(*sys.argv[1:])))
