"""The structure of ``benchmarks/``: no import circle, no long file."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "benchmarks").rglob("*.py")
}


def imported(path: Path) -> set[str]:
    """The modules of ``benchmarks`` that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & FILES.keys()


def test_no_import_circle() -> None:
    """A circle has no order, which raises."""
    graph = {module: imported(path) - {module} for module, path in FILES.items()}
    assert set(TopologicalSorter(graph).static_order()) == FILES.keys()
    assert any(len(targets) > 5 for targets in graph.values())  # a search that finds nothing would pass


def test_files_are_short() -> None:
    """No file is longer than 400 lines."""
    lengths = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in FILES.items()}
    assert {module: length for module, length in lengths.items() if length > 400} == {}
