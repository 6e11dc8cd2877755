"""Tests whose outcomes become a table."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.common.results import ROOT

__all__ = ["cases_of", "outcome_of"]

SURROUNDINGS = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}


def cases_of(python: str, *tests: str) -> list[ElementTree.Element]:
    """Run ``tests`` with an interpreter; returns pytest's record of each case."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [python, "-m", "pytest", "-q", *tests, f"--junitxml={report}", "-p", "no:cacheprovider"]
        subprocess.run(command, cwd=ROOT, env={**os.environ, **SURROUNDINGS}, check=False, stdout=sys.stderr)
        return list(ElementTree.parse(report).iter("testcase"))


def outcome_of(case: ElementTree.Element) -> str:
    """What came of a case: passed, failed or skipped."""
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    return "passed" if case.find("skipped") is None else "skipped"
