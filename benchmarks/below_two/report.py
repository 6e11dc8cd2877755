"""The tables and the picture of the benchmark."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.common.tables import markdown_table

Rows = list[dict[str, Any]]

WAYS = ("strength", "ratio 1")
TITLES = {
    "fraction": "A part of the micro-batches",
    "cost": "Seconds in a trainer, accumulation 4",
    "convergence": "A known solution",
    "hacking": "Reward hacking",
}


def document(found: dict[str, Any], name: str) -> str:
    """All tables, each with its stamp."""
    parts = ["# Below two gradients", f"![Parts, a known solution, reward hacking]({name}.png)"]
    for study, title in TITLES.items():
        if study in found:
            stamped = ", ".join(f"{key}: {value}" for key, value in found[study]["stamp"].items() if key != "command")
            parts += [f"## {title}", "\n".join(TABLES[study](found[study]["figures"])), f"({stamped})"]
    return "\n\n".join(parts) + "\n"


def _spread(values: list[float]) -> str:
    """The mean, and the 5% and 95% quantiles."""
    low, high = np.quantile(values, [0.05, 0.95])
    return f"{fmean(values):.2f} ({low:.2f} to {high:.2f})"


def by_problem(rows: Rows) -> dict[str, Rows]:
    """The rows of each problem."""
    return {name: [row for row in rows if row["problem"] == name] for name in dict.fromkeys(row["problem"] for row in rows)}


def parts_of(windows: Rows, fraction: float, column: str) -> list[float]:
    """A figure of all parts of that size, over all windows."""
    columns = (window["parts"] for window in windows)
    return [
        value for parts in columns for size, value in zip(parts["fraction"], parts[column], strict=True) if size == fraction
    ]


def fractions_of(windows: Rows) -> list[float]:
    """The sizes of the parts, as fractions."""
    return sorted(set(windows[0]["parts"]["fraction"]))


def fraction_table(rows: Rows) -> list[str]:
    """A row for each problem and fraction."""
    columns = ["change", "g, strength", "g, strength, length", "g, ratio 1", "g, ratio 1, length", "gradient"]
    heads = [
        "of H·g1",
        "of g at the given γ",
        "its length, ×",
        "of g at ratio 1",
        "its length, ×",
        "of g1 of the part alone",
    ]
    body = []
    for name, windows in by_problem(rows).items():
        ratio = fmean(window["penalty_ratio"] for window in windows)
        agreement = {key: fmean(window["agreement"][key] for window in windows) for key in ("gradient", "change")}
        about = f"{name}: {len(windows)} steps, penalty ratio {ratio:.2g}"
        about += f", cosines of two micro-batches: of g1 {agreement['gradient']:.2f}, of H·g1 {agreement['change']:.2f}"
        for fraction in fractions_of(windows):
            cells = (_spread(parts_of(windows, fraction, column)) for column in columns)
            noise = (f"{fmean(window['noise'][way] for window in windows) * (1 / fraction - 1):.2g}" for way in WAYS)
            body.append([about, f"{fraction:g}", f"{math.sqrt(fraction):.2f}", *cells, ", ".join(noise)])
            about = ""
    return markdown_table(["problem", "f", "√f", *heads, "noise added, × that of the batch: given γ, ratio 1"], body)


def cost_table(rows: Rows) -> list[str]:
    """Seconds of a step, and the time relative to a plain step with quartiles."""
    columns = list(rows[0]["rows"]["plain"])
    body = []
    for row in rows:
        for name, figures in row["rows"].items():
            ratios = (figures[column]["ratio"] for column in columns)
            cells = (f"{middle:.2f} ({low:.2f} to {high:.2f})" for low, middle, high in ratios)
            seconds = f"{figures[columns[0]]['seconds']:.2f}"
            body.append([f"{row['kind']}, {row['parameters'] / 1e6:.1f} M parameters", name, seconds, *cells])
    return markdown_table(["trainer", "difference on", "seconds", *(f"× plain, {column}" for column in columns)], body)


def convergence_table(rows: Rows) -> list[str]:
    """Mean distances over problems, with their ranges."""
    body = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        cells = []
        for base in dict.fromkeys(row["base"] for row in rows):
            for column in ("steps", "gradients"):
                values = [row[column] for row in rows if (row["variant"], row["base"]) == (variant, base)]
                cells.append(f"{fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})")
        body.append([variant, *cells])
    heads = [
        f"{base}, after as many {what}"
        for base in dict.fromkeys(row["base"] for row in rows)
        for what in ("steps", "gradients")
    ]
    return markdown_table(["", *heads], body)


def hacking_table(rows: dict[str, Any]) -> list[str]:
    """The final gold of each arm, and its gains, paired by seed."""

    def cell(value: dict[str, Any] | None) -> str:
        return f"{value['mean']:.2f} ({value['low']:.2f} to {value['high']:.2f})" if value else ""

    body = []
    for name, row in rows.items():
        figures, gains = row["figures"], row["gain"]
        golds = ", ".join(f"{gold:.1f}" for gold in row["runs"])
        body.append([name, *map(cell, (figures["final"], gains["whole"], gains["none"], figures["final_proxy"])), golds])
    return markdown_table(
        ["arm", "final gold", "gain over whole", "gain over none", "final proxy", "final gold of each seed"], body
    )


TABLES = {
    "fraction": fraction_table,
    "cost": cost_table,
    "convergence": convergence_table,
    "hacking": hacking_table,
}


def picture(found: dict[str, Any], path: Path) -> None:
    """Draw three panels; those of studies without results stay empty."""
    drawing, panels = plt.subplots(1, 3, figsize=(16, 4.5), constrained_layout=True)
    for axes, study in zip(panels, (name for name in TITLES if name != "cost"), strict=True):
        axes.set_title(TITLES[study], fontsize=10)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        if study in found:
            DRAWN[study](axes, found[study])
    drawing.savefig(path, dpi=130)
    plt.close(drawing)


def draw_fraction(axes: Any, rows: Rows) -> None:
    """Draw cosines by fraction: of H·g1, of g at penalty ratio 1, and of the gradient of the part alone."""
    for colour, (name, windows) in zip(plt.cm.tab10.colors, by_problem(rows).items(), strict=False):
        fractions = fractions_of(windows)
        for column, style in (("change", "-"), ("g, ratio 1", "--"), ("gradient", ":")):
            means = [fmean(parts_of(windows, fraction, column)) for fraction in fractions]
            axes.plot(fractions, means, style, color=colour, marker=".", label=name if style == "-" else None)
    axes.plot(fractions, [math.sqrt(fraction) for fraction in fractions], color="grey", linewidth=1, label="√f")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("fraction. Lines: H·g1; dashed: g at penalty ratio 1; dotted: g1 of the part alone", fontsize=9)
    axes.set_ylabel("cosine with that of all micro-batches", fontsize=9)
    axes.legend(frameon=False, fontsize=8)


def draw_convergence(axes: Any, rows: Rows) -> None:
    """Draw distances by period after a fixed number of steps, both optimizers together."""
    ways = list(dict.fromkeys(row["variant"].partition(", ")[2] for row in rows if "," in row["variant"]))
    one = fmean(row["steps"] for row in rows if row["variant"] == "every=1")
    for way in ways:
        found: dict[int, list[float]] = {1: [one]}
        for row in rows:
            if row["variant"].endswith(way):
                found.setdefault(int(row["variant"].split("=")[1].split(",")[0]), []).append(row["steps"])
        axes.plot(list(found), [fmean(values) for values in found.values()], marker="o", label=way)
    axes.axhline(
        fmean(row["steps"] for row in rows if row["variant"] == "none"), color="grey", linewidth=1, label="no penalty"
    )
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 1.2)
    axes.set_xlabel("every", fontsize=9)
    axes.set_ylabel("distance from the penalised minimum", fontsize=9)
    axes.legend(frameon=False, fontsize=8)


def draw_hacking(axes: Any, rows: dict[str, Any]) -> None:
    """Draw the final gold of each arm and of each of its runs."""
    for at, (_, row) in enumerate(rows.items()):
        value = row["figures"]["final"]
        axes.errorbar(
            value["mean"], at, xerr=[[value["mean"] - value["low"]], [value["high"] - value["mean"]]], fmt="o", color="black"
        )
        axes.plot(row["runs"], [at + 0.2] * len(row["runs"]), ".", color="tab:red", alpha=0.6)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("gold at the end: mean over seeds with its 95% interval, and each seed", fontsize=9)


DRAWN = {"fraction": draw_fraction, "convergence": draw_convergence, "hacking": draw_hacking}
