"""The report of one or two training runs, made from the trainers' logs: a table, a figure and the logs.

``runs`` maps the name of a run, ``plain`` or ``regularized``, to its log, ``trainer.state.log_history``. If
there are two, the plain one comes first.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, median, stdev
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
RELATIVE = tuple(
    f"grad_reg/{name}" for name in ("penalty_ratio", "curvature", "cosine", "perturbation_fidelity")
)
MEANS = ("reward", "grad_reg/second_pass_time")
COLOURS = ("tab:blue", "tab:orange")
PACKAGES = ("torch", "transformers", "trl", "reasoning-gym")


def training_rows(history: list[Row]) -> list[Row]:
    """The log rows of training steps; evaluations and the final summary have no ``reward`` and are left out.

    Where all answers to each task earned the same reward, the gradient is 0. Figures relative
    to it are left out.
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
    """The average of each figure over the first quarter of the steps, the last quarter, and all steps.

    Rewards and times are averaged by the mean. The ``grad_reg`` figures are averaged by the median, because
    in single steps they reach a multiple of their usual value. Two figures exist for the whole run only: the
    wall-clock time of a step, and the fraction of it that the second pass takes. A figure that was not
    logged is left out.
    """
    rows = training_rows(history)
    quarter = max(1, len(rows) // 4)
    parts = {"first": rows[:quarter], "last": rows[-quarter:], "all": rows}
    summary = {
        key: {
            part: (fmean if key in MEANS else median)(values)
            for part, of in parts.items()
            if (values := series(of, key))
        }
        for key in ("reward", *PANELS)
    }
    seconds = [
        row["train_runtime"] / row["step"] for row in history if "train_runtime" in row and row["step"]
    ]
    if seconds:
        summary["seconds per step"] = {"all": seconds[-1]}
        if second_pass := summary["grad_reg/second_pass_time"]:
            summary["share of the second pass"] = {"all": second_pass["all"] / seconds[-1]}
    return {key: averages for key, averages in summary.items() if averages}


ROWS = {
    "reward, mean of the first quarter": ("reward", "first"),
    "reward, mean of the last quarter": ("reward", "last"),
    "g1_norm, median": ("grad_reg/g1_norm", "all"),
    "penalty_ratio, median": ("grad_reg/penalty_ratio", "all"),
    "curvature, median": ("grad_reg/curvature", "all"),
    "seconds per step": ("seconds per step", "all"),
    "share of the second pass": ("share of the second pass", "all"),
}


def table(summaries: dict[str, dict[str, dict[str, float]]]) -> Table:
    """The summaries as a table to print, one column for each run."""
    out = Table("")
    for name in summaries:
        out.add_column(name, justify="right")
    for row, (key, part) in ROWS.items():
        figures = (summary.get(key, {}).get(part) for summary in summaries.values())
        out.add_row(row, *("–" if value is None else f"{value:.3g}" for value in figures))
    return out


def comparison(plain: list[Row], regularized: list[Row]) -> str:
    """What to make of two runs from the same seed on the same prompts."""
    before, after = (summarize(history) for history in (plain, regularized))
    pairs = list(
        zip(*(series(training_rows(history), "reward") for history in (plain, regularized)), strict=True)
    )
    differences = [second - first for first, second in pairs[-max(1, len(pairs) // 4) :]]
    difference = f"{fmean(differences):+.2f}"
    if len(differences) > 1:
        error = 2 * stdev(differences) / len(differences) ** 0.5
        verdict = "within" if abs(fmean(differences)) <= error else "more than"
        difference += f" ± {error:.2f} (two standard errors), which is {verdict} the noise of these steps"
    cost = after["seconds per step"]["all"] / before["seconds per step"]["all"]
    return (
        "What to make of it: both runs started from the same weights and seed, and saw the same prompts. "
        f"Over the last quarter the mean reward was {before['reward']['last']:.2f} plain and "
        f"{after['reward']['last']:.2f} regularized: {difference}. A few steps of one seed do not decide "
        "which is better. They show how the model trains under the penalty (reward "
        f"{after['reward']['first']:.2f} at first, {after['reward']['last']:.2f} at the end), and that a "
        f"step took {cost:.2f} times as long as a plain one. Whether the penalty prevents reward hacking is "
        "another question: make reward-hacking."
    )


def figure(runs: dict[str, list[Row]], path: Path, title: str) -> None:
    """Draw the rewards, and below them one panel for each ``grad_reg`` figure that was logged."""
    rows = training_rows(list(runs.values())[-1])
    panels = [key for key in PANELS if series(rows, key)]
    below = -(-len(panels) // 3)
    drawing = plt.figure(figsize=(10, 3 + 2.2 * below), layout="constrained")
    grid = drawing.add_gridspec(1 + below, 3, height_ratios=[1.4] + [1] * below)
    _reward_panel(drawing.add_subplot(grid[0, :]), runs)
    for place, key in enumerate(panels):
        axes = drawing.add_subplot(grid[1 + place // 3, place % 3])
        logged = [row for row in rows if row.get(key) is not None]
        axes.plot([row["step"] for row in logged], series(logged, key), color=COLOURS[0], linewidth=1)
        if key == "grad_reg/perturbation_fidelity":  # in fp32 it is 1 to many digits: do not magnify the rest
            axes.set_ylim(0, 1.1 * max(series(logged, key)))
        _finish(axes, PANELS[key])
    drawing.suptitle(title)
    drawing.savefig(path, dpi=150)
    plt.close(drawing)


def _reward_panel(axes: Axes, runs: dict[str, list[Row]]) -> None:
    """The reward of each step, and its mean over a window of steps."""
    for colour, (name, history) in zip(COLOURS, reversed(runs.items()), strict=False):
        rows = training_rows(history)
        steps, rewards = [row["step"] for row in rows], series(rows, "reward")
        reach = max(1, len(rows) // 16)
        smooth = [fmean(rewards[max(0, i - reach) : i + reach + 1]) for i in range(len(rewards))]
        axes.plot(steps, rewards, color=colour, alpha=0.35, linewidth=1)
        axes.plot(steps, smooth, color=colour, linewidth=2, label=f"{name}, mean of {2 * reach + 1} steps")
    axes.legend(loc="lower right", frameon=False)
    _finish(axes, "mean reward")


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("step", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)


def save(runs: dict[str, list[Row]], path: Path, command: str) -> None:
    """Write the logs as JSON, with their summaries, the versions and the command.

    Those of the only run, or of the regularized one, are at the top, those of the plain one beside
    it under ``plain``.
    """
    installed = [package for package in PACKAGES if find_spec(package.replace("-", "_"))]
    versions = {"gradreg_optim": gradreg_optim.__version__} | {
        package: version(package) for package in installed
    }
    logs = {name: {"summary": summarize(history), "log_history": history} for name, history in runs.items()}
    record = {"command": command, "versions": versions, **logs.popitem()[1], **logs}
    path.write_text(json.dumps(record, indent=1), encoding="utf-8")
