"""The tables of the trainers that were tested."""

from __future__ import annotations

from typing import Any

from benchmarks.common.tables import markdown_table

__all__ = ["summary", "table"]

MARKS = {"works": "✓", "refused": "refused", "absent": "–", "fails": "**fails**"}


def table(runs: list[dict[str, Any]]) -> str:
    """One row for each trainer, one column for each version."""
    columns = [
        f"trl {run['versions']['trl']}, transformers {run['versions']['transformers']}" for run in runs
    ]
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
        failing = [
            f"{', '.join(names[outcome])}: {outcome}" for outcome in ("refused", "fails") if names[outcome]
        ]
        rows.append([f"trl {run['versions']['trl']}", ", ".join(names["works"]), "; ".join(failing)])
    lines = [f"What was tested, by `make trainers` ([how]({document})):", ""]
    return "\n".join(lines + markdown_table(["", "trains regularized", "not"], rows))
