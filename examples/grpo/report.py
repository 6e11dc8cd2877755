"""The report of a training run, made from the trainer's log history: a table, a figure and the log itself."""

from __future__ import annotations

import json
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, median
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from rich.table import Table

import gradreg_optim

Row = dict[str, Any]

PANELS = {
    "grad_reg/g1_norm": "‖g1‖, gradient norm",
    "grad_reg/penalty_ratio": "‖penalty‖ / ‖g1‖",
    "grad_reg/curvature": "curvature along g1",
    "grad_reg/cosine": "cosine of g1 and g2",
    "grad_reg/perturbation_fidelity": "perturbation fidelity",
    "grad_reg/second_pass_time": "second pass, seconds",
}
RELATIVE = tuple(f"grad_reg/{name}" for name in ("penalty_ratio", "curvature", "cosine", "perturbation_fidelity"))
MEANS = ("reward", "grad_reg/second_pass_time")
PACKAGES = ("torch", "transformers", "trl", "reasoning-gym")


def training_rows(history: list[Row]) -> list[Row]:
    """The log rows of training steps. Evaluations and the summary at the end have no ``reward`` and are left out.

    Where all answers to each task earned the same reward, the gradient is 0. Figures relative to it are left out.
    """
    return [
        {key: value for key, value in row.items() if key not in RELATIVE or row["grad_reg/g1_norm"] > 0}
        for row in history
        if "reward" in row
    ]


def series(rows: list[Row], key: str) -> list[float]:
    """The values of ``key`` in order, without the rows that lack it."""
    return [float(row[key]) for row in rows if row.get(key) is not None]


def summarize(history: list[Row]) -> dict[str, dict[str, float]]:
    """The average of each figure over the first quarter of the steps, over the last quarter, and over all of them.

    Rewards and times are averaged by the mean. The ``grad_reg`` figures are averaged by the median, because in single steps
    they reach a multiple of their usual value. Two figures exist for the whole run only: the wall-clock time of a step, and
    the fraction of it that the second pass takes. A figure that was not logged is left out.
    """
    rows = training_rows(history)
    quarter = max(1, len(rows) // 4)
    parts = {"first": rows[:quarter], "last": rows[-quarter:], "all": rows}
    summary = {
        key: {part: (fmean if key in MEANS else median)(values) for part, of in parts.items() if (values := series(of, key))}
        for key in ("reward", *PANELS)
    }
    seconds = [row["train_runtime"] / row["step"] for row in history if "train_runtime" in row and row["step"]]
    if seconds:
        summary["seconds per step"] = {"all": seconds[-1]}
        if second_pass := summary["grad_reg/second_pass_time"]:
            summary["share of the second pass"] = {"all": second_pass["all"] / seconds[-1]}
    return {key: averages for key, averages in summary.items() if averages}


def table(summary: dict[str, dict[str, float]]) -> Table:
    """The summary as a table to print."""
    out = Table("", *(f"{part} quarter" if part != "all" else "all steps" for part in ("first", "last", "all")))
    names = {
        "reward": "reward, mean",
        "grad_reg/g1_norm": "g1_norm, median",
        "grad_reg/penalty_ratio": "penalty_ratio, median",
        "grad_reg/curvature": "curvature, median",
        "seconds per step": "seconds per step",
        "share of the second pass": "share of the second pass",
    }
    for key, name in names.items():
        averages = summary.get(key, {})
        missing = {"first": "", "last": "", "all": "" if averages else "n/a"}
        out.add_row(name, *(f"{averages[part]:.3g}" if part in averages else missing[part] for part in missing))
    for column in out.columns[1:]:
        column.justify = "right"
    return out


def figure(history: list[Row], path: Path, title: str) -> None:
    """Draw the reward, and below it one panel for each ``grad_reg`` figure that was logged."""
    rows = training_rows(history)
    panels = [key for key in PANELS if series(rows, key)]
    below = -(-len(panels) // 3)
    drawing = plt.figure(figsize=(10, 3 + 2.2 * below), layout="constrained")
    grid = drawing.add_gridspec(1 + below, 3, height_ratios=[1.4] + [1] * below)
    _reward_panel(drawing.add_subplot(grid[0, :]), rows)
    for place, key in enumerate(panels):
        axes = drawing.add_subplot(grid[1 + place // 3, place % 3])
        logged = [row for row in rows if row.get(key) is not None]
        axes.plot([row["step"] for row in logged], series(logged, key), color="tab:gray", linewidth=1)
        if key == "grad_reg/perturbation_fidelity":  # in fp32 it is 1 to many digits: do not magnify the rest
            axes.set_ylim(0, 1.1 * max(series(logged, key)))
        _finish(axes, PANELS[key])
    drawing.suptitle(title)
    drawing.savefig(path, dpi=150)
    plt.close(drawing)


def _reward_panel(axes: Axes, rows: list[Row]) -> None:
    """The reward of each step, and its mean over a window of steps."""
    steps, rewards = [row["step"] for row in rows], series(rows, "reward")
    reach = max(1, len(rows) // 16)
    smooth = [fmean(rewards[max(0, i - reach) : i + reach + 1]) for i in range(len(rewards))]
    axes.plot(steps, rewards, color="tab:blue", alpha=0.35, linewidth=1, label="each step")
    axes.plot(steps, smooth, color="tab:blue", linewidth=2, label=f"mean of {2 * reach + 1} steps")
    axes.legend(loc="lower right", frameon=False)
    _finish(axes, "mean reward")


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("step", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)


def save(history: list[Row], path: Path, command: str) -> None:
    """Write the log history as JSON, with the summary, the versions and the command it came from."""
    installed = [package for package in PACKAGES if find_spec(package.replace("-", "_"))]
    versions = {"gradreg_optim": gradreg_optim.__version__} | {package: version(package) for package in installed}
    record = {"command": command, "versions": versions, "summary": summarize(history), "log_history": history}
    path.write_text(json.dumps(record, indent=1), encoding="utf-8")
