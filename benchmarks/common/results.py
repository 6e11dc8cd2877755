"""Where results go, and the stamp they carry.

A result is a folder ``results/<date>-<question>`` with the files ``result.md``, ``result.json`` and, if there is a picture,
``result.png``. Runs with tiny models (``--quick``) write such folders to ``runs/quick``, which git ignores.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import date
from pathlib import Path

import torch

__all__ = ["QUICK", "RESULTS", "ROOT", "between_marks", "newest", "same_commit", "stamp", "todays"]

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
QUICK = ROOT / "runs" / "quick"
DAY = "[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]"


def todays(question: str, *, quick: bool = False) -> Path:
    """The path of today's result for a question, without a suffix."""
    return (QUICK if quick else RESULTS) / f"{date.today()}-{question}" / "result"


def newest(question: str, results: Path = RESULTS, file: str = "result.json") -> Path:
    """The file of the newest result for a question.

    Raises:
        FileNotFoundError: there is none.
    """
    found = sorted(results.glob(f"{DAY}-{question}/{file}"))
    if not found:
        raise FileNotFoundError(f"{results} must have a file *-{question}/{file}: run that benchmark first")
    return found[-1]


def stamp() -> dict[str, str]:
    """Date, hardware, versions, commit and command of a measurement."""
    try:
        describe = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(describe, capture_output=True, text=True, cwd=ROOT, check=False).stdout.strip()
    except FileNotFoundError:  # a machine without git
        commit = ""
    processor = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()}, CPU"
    return {
        "date": date.today().isoformat(),
        "hardware": f"{processor}, {torch.get_num_threads()} threads",
        "load": f"{os.getloadavg()[0]:.1f} processes at the end",
        "versions": f"torch {torch.__version__}, Python {platform.python_version()}",
        "commit": commit or "unknown",
        "command": _command(),
    }


def _command() -> str:
    """The command line that runs this program again from the root of the repository."""
    program = Path(sys.argv[0]).resolve()
    name = program.name
    if program.is_relative_to(ROOT / "benchmarks"):
        module = ".".join(program.relative_to(ROOT).with_suffix("").parts)
        name = f"-m {module.removesuffix('.__main__')}"
    return f"python {name} {shlex.join(sys.argv[1:])}".strip()


def same_commit(one: dict[str, str], other: dict[str, str]) -> bool:
    """Whether two stamps are of the same commit. A run writes results, which makes the tree dirty; that does not count."""
    return one["commit"].removesuffix("-dirty") == other["commit"].removesuffix("-dirty")


def between_marks(text: str, name: str, replacement: str) -> str:
    """``text`` with ``replacement`` between its lines ``<!-- name -->`` and ``<!-- end -->``.

    Raises:
        ValueError: there are no such lines.

    >>> between_marks("a\\n<!-- cost -->\\nold\\n<!-- end -->\\nb\\n", "cost", "new")
    'a\\n<!-- cost -->\\nnew\\n<!-- end -->\\nb\\n'
    """
    before, mark, rest = text.partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition("<!-- end -->")
    if not mark or not end:
        raise ValueError(f"the text must have a line '<!-- {name} -->' and, below it, a line '<!-- end -->'")
    return f"{before}{mark}{replacement.strip()}\n{end}{after}"
