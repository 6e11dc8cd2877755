"""The tables and the picture of the study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.common.tables import markdown_table
from benchmarks.hacking.arms import PLAIN, Run, Runs
from benchmarks.hacking.summary import FIGURES, column, interval


def cell(values: dict[str, Any], seeds: int, *, sign: bool = False, none: str = "never") -> str:
    """Mean and interval, and the number of seeds with a value unless all have one."""
    if values["mean"] is None:
        return none
    form = "{:+.2f}" if sign else "{:.2f}"
    text = f"{form.format(values['mean'])} ({values['low']:.2f} to {values['high']:.2f})"
    return text if values["count"] == seeds else f"{text}, {values['count']} of {seeds}"


def main_table(summary: dict[str, dict[str, Any]]) -> list[str]:
    """The figures, one row for each family."""
    rows = [
        [family, row["setting"], *(cell(row["figures"][name], len(row["seeds"])) for name in FIGURES)]
        for family, row in summary.items()
    ]
    return markdown_table(["arm", "setting", *FIGURES.values()], rows)


def measures_table(summary: dict[str, dict[str, Any]]) -> list[str]:
    """The wrapper's metrics, one row for each family."""
    titles = list(next(iter(summary.values()))["measures"])
    rows = []
    for family, row in summary.items():
        cells = [cell(row["measures"][title], len(row["seeds"]), none="not measured") for title in titles]
        rows.append([family, row["setting"], *cells])
    return markdown_table(["arm", "setting", *titles], rows)


def gain_table(
    summary: dict[str, dict[str, Any]], baselines: Sequence[str], names: Sequence[str]
) -> list[str]:
    """Differences paired by seed, with columns for the baselines that were run."""
    columns = [f"{name} over {other}" for other in baselines if other in summary for name in names]
    titles = [f"{FIGURES[name]}, over {other}" for other in baselines if other in summary for name in names]
    rows = []
    for family, row in summary.items():
        cells = [
            cell(row["gain"][name], len(row["seeds"]), sign=True) if name in row["gain"] else ""
            for name in columns
        ]
        rows.append([family, *cells])
    return markdown_table(["gain in gold", *titles], rows)


START, END = "<!-- figures -->", "<!-- end -->"
"""The marks around the generated part of a document."""


def words_around(path: Path, title: str) -> tuple[str, str]:
    """The text of a document before and after its generated part; for a file that does not exist, its title.

    Raises:
        ValueError: the file exists and has no such part; it would be overwritten.
    """
    document = path.read_text() if path.exists() else f"{title}\n\n{START}\n{END}\n"
    before, start, rest = document.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise ValueError(
            f"{path} has no part between {START} and {END} to write the tables to. Give another --output"
        )
    return before, after


def rewrite(path: Path, text: str, title: str) -> None:
    """Write ``text`` to the generated part of a document."""
    before, after = words_around(path, title)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{before}{START}\n{text}\n{END}{after}")


def picture(parts: Mapping[str, Runs], path: Path, title: str) -> None:
    """Draw proxy and gold over steps for at most two parts, gold over proxy, and ‖g1‖ with the proxy's
    accuracy.

    Proxies of different seeds have different origins and scales, so the proxy is shown in units of the plain
    run's gain.
    """
    shown = dict(list(parts.items())[:2])
    columns = len(shown) + 1
    drawing, panels = plt.subplots(2, columns, figsize=(5 * columns, 8), layout="constrained")
    third, fourth = panels[:, 2] if len(shown) > 1 else panels[1]
    families = dict.fromkeys(family for runs in shown.values() for family in runs)
    palette = plt.get_cmap("tab10" if len(families) <= 10 else "tab20").colors
    colours = {**dict(zip(families, palette * len(families), strict=False)), PLAIN: "black"}
    for row, (part, runs) in enumerate(shown.items()):
        label = f"; {lowered(part)}" if len(shown) > 1 else ""
        courses(*panels[row, :2], runs, colours)
        _finish(panels[row, 0], f"proxy gain (plain run at the end: 1){label}", "step")
        _finish(panels[row, 1], f"gold{label}", "step")
        panels[row, 0].legend(frameon=False, fontsize=8, loc="upper left")
    first = next(iter(shown.values()))
    for family, group in first.items():
        scaled = in_units_of_plain(group, first[PLAIN])
        third.plot(
            averages(scaled, "proxy"),
            averages(scaled, "gold"),
            color=colours[family],
            marker=".",
            linewidth=1.5,
        )
    _finish(
        third,
        "gold over proxy, means over seeds" + (f"; {lowered(next(iter(shown)))}" if len(shown) > 1 else ""),
        "gain in proxy",
    )
    norm = fourth.twinx()
    course(fourth, first[PLAIN], "proxy_accuracy", "black", "accuracy of the proxy on the policy's answers")
    course(norm, first[PLAIN], "g1_norm", "tab:red", "‖g1‖ (right)")
    _finish(fourth, "the plain run: is the gradient large where the proxy errs?", "step")
    norm.tick_params(labelsize=8)
    lines = [line for axes in (fourth, norm) for line in axes.get_lines()]
    fourth.legend(lines, [str(line.get_label()) for line in lines], frameon=False, fontsize=8)
    drawing.suptitle(title)
    drawing.savefig(path, dpi=110)
    plt.close(drawing)


def lowered(title: str) -> str:
    """A title with a small first letter, for the middle of a sentence."""
    return title[:1].lower() + title[1:]


def courses(proxy: Axes, gold: Axes, runs: Runs, colours: Mapping[str, Any]) -> None:
    """Draw every family over steps. The range of gold fits all families except the plain one."""
    for family, group in runs.items():
        scaled = in_units_of_plain(group, runs[PLAIN])
        course(proxy, scaled, "proxy", colours[family], family)
        course(gold, scaled, "gold", colours[family], family)
    spans = {
        family: [
            interval(list(values)) for values in zip(*(column(one, "gold") for one in group), strict=True)
        ]
        for family, group in runs.items()
    }
    low = min((at["low"] for family, span in spans.items() if family != PLAIN for at in span), default=None)
    if low is not None:
        high = max(at["high"] for span in spans.values() for at in span)
        gold.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))


def in_units_of_plain(group: Sequence[Run], plain: Sequence[Run]) -> list[Run]:
    """Runs with the proxy in units of the plain run's gain, by seed."""
    ends = {one["seed"]: one["curve"][-1]["proxy"] for one in plain}
    return [scaled_to(one, ends[one["seed"]]) for one in group]


def scaled_to(one: Run, end: float) -> Run:
    """A run with the proxy counted from its start, in units of the gain up to ``end``."""
    start = one["curve"][0]["proxy"]
    gain = (end - start) or 1.0
    return {**one, "curve": [{**point, "proxy": (point["proxy"] - start) / gain} for point in one["curve"]]}


def course(axes: Axes, group: Sequence[Run], name: str, colour: Any, label: str) -> None:
    """Draw the mean over seeds of a quantity over steps, with its bootstrap interval."""
    points = list(zip(*(one["curve"] for one in group), strict=True))
    kept = [(at[0]["step"], interval([point.get(name) for point in at])) for at in points]
    kept = [(step, values) for step, values in kept if values["mean"] is not None]
    steps = [step for step, _ in kept]
    axes.plot(steps, [values["mean"] for _, values in kept], color=colour, label=label, linewidth=1.5)
    axes.fill_between(
        steps,
        [v["low"] for _, v in kept],
        [v["high"] for _, v in kept],
        color=colour,
        alpha=0.12,
        linewidth=0,
    )


def averages(group: Sequence[Run], name: str) -> list[float]:
    """Means over seeds at each measured step."""
    return [fmean(values) for values in zip(*(column(one, name) for one in group), strict=True)]


def _finish(axes: Axes, title: str, x: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)
