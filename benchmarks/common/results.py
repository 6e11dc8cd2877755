"""Where results go, and the stamp they carry.

A result is a folder ``results/<date>-<question>`` with the files ``result.md``, ``result.json`` and, if there
is a picture, ``result.png``. Runs with tiny models (``--quick``) write such folders to ``runs/quick``, which
git ignores.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "RESULTS",
    "ROOT",
    "Record",
    "between_marks",
    "commit",
    "newest",
    "stamp",
    "todays",
    "version_of",
    "write_both",
]

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


def commit() -> str:
    """The commit of the repository; ``unknown`` where there is none."""
    try:
        describe = ["git", "describe", "--always", "--dirty"]
        found = subprocess.run(describe, capture_output=True, text=True, cwd=ROOT, check=False).stdout.strip()
    except FileNotFoundError:  # a machine without git
        found = ""
    return found or "unknown"


def version_of(package: str) -> str | None:
    """The version of a package; ``None`` if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def stamp() -> dict[str, str]:
    """Date, hardware, versions, commit and command of a measurement."""
    processor = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()}, CPU"
    return {
        "date": date.today().isoformat(),
        "hardware": f"{processor}, {torch.get_num_threads()} threads",
        "load": f"{os.getloadavg()[0]:.1f} processes at the end",
        "versions": f"torch {torch.__version__}, Python {platform.python_version()}",
        "commit": commit(),
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


class Record:
    """Figures by the name of their part. The file is written after each part: a stopped run can continue."""

    def __init__(self, file: Path, *, fresh: bool = False) -> None:
        self.file = file
        self.parts: dict[str, Any] = json.loads(file.read_text()) if file.exists() and not fresh else {}

    def has(self, name: str, settings: dict[str, Any]) -> bool:
        """Whether the part is there, with these settings and of this commit.

        A run writes results, which makes the tree dirty; that does not count.
        """
        if name not in self.parts or self.parts[name]["settings"] != settings:
            return False
        commits = (self.parts[name]["stamp"]["commit"], commit())
        return len({one.removesuffix("-dirty") for one in commits}) == 1

    def keep(self, name: str, part: dict[str, Any]) -> None:
        """Stamp a part and write the file."""
        self.parts[name] = {"stamp": stamp(), **part}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self.parts, indent=1) + "\n", encoding="utf-8")


def write_both(output: Path, figures: Any, text: str) -> None:
    """Write the figures and the document of a result, to ``output`` with the suffixes .json and .md."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    output.with_suffix(".md").write_text(text, encoding="utf-8")


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
