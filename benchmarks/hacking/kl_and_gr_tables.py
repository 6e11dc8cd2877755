"""The tables and pictures of :mod:`benchmarks.hacking.kl_and_gr`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.common.tables import markdown_table
from benchmarks.hacking.arms import PLAIN
from benchmarks.hacking.report import course, rewrite
from benchmarks.hacking.study import final
from benchmarks.hacking.summary import column, interval

Run = dict[str, Any]
Block = tuple[str, int, int]
"""A problem, the answers a step and the steps."""
KL, PAIR, GR, GR_PUBLISHED = "KL", "KL + GR", "GR", "GR published"
ORDER = [PLAIN, GR_PUBLISHED, GR, KL, f"{KL} + {GR_PUBLISHED}", PAIR]
COLOURS = dict(zip(ORDER, ("black", "tab:brown", "tab:orange", "tab:blue", "tab:purple", "tab:green"), strict=True))
TITLES = {"learned": "Learned reward", "loophole": "Verifier with a loophole", "judge": "LLM judge"}


def by_setting(runs: Iterable[Run]) -> dict[Block, dict[str, dict[int, Run]]]:
    """Runs by problem, answers a step and steps, then by the name of their setting, then by seed."""
    found: dict[Block, dict[str, dict[int, Run]]] = {}
    for one in runs:
        block = found.setdefault((one["problem"], one["answers"], one["steps"]), {})
        block.setdefault(one["arm"]["name"], {})[one["seed"]] = one
    return found


def side(name: str) -> str:
    """The side of a setting."""
    if name == PLAIN:
        return PLAIN
    kind = GR_PUBLISHED if "gr-eps" in name else GR if "gr-" in name else ""
    return " + ".join(filter(None, [KL if name.startswith("kl-") else "", kind]))


def spread(values: Iterable[float], sign: str = "") -> str:
    """Mean and 95% bootstrap interval."""
    of = interval(list(values))
    return f"{of['mean']:{sign}.3f} ({of['low']:.3f} to {of['high']:.3f})"


def table(settings: dict[str, dict[int, Run]]) -> list[str]:
    """A row for each setting: gold at the end, and its differences from the KL penalty and from GR, paired by seed."""
    of_side = {side(name): runs for name, runs in settings.items()}
    rows = []
    for name, runs in sorted(settings.items(), key=lambda item: ORDER.index(side(item[0]))):
        cells = [
            spread((final(one) - final(of_side[other][seed]) for seed, one in runs.items() if seed in of_side[other]), "+")
            if other in of_side and other != side(name) and runs.keys() & of_side[other].keys()
            else ""
            for other in (KL, GR)
        ]
        peaks, distance = ([figure(one) for one in runs.values()] for figure in (peak, distance_at_end))
        ends = spread(final(one) for one in runs.values())
        rows.append([side(name), name, str(len(runs)), ends, *cells, f"{fmean(peaks):.2f}", f"{fmean(distance):.1f}"])
    head = ["arm", "setting", "seeds", "gold at the end", "over KL", "over GR", "peak of gold", "KL at the end"]
    return markdown_table(head, rows)


def peak(one: Run) -> float:
    """The highest gold of a run."""
    return float(max(column(one, "gold")))


def distance_at_end(one: Run) -> float:
    """KL from the start at the end of a run, in nats for each answer."""
    return float(one["curve"][-1]["kl"])


def tuning_table(tried: Iterable[Run]) -> list[str]:
    """What each side was tuned over: mean gold at the end, of the settings that ran on most seeds."""
    rows = []
    for (problem, answers, steps), settings in by_setting(tried).items():
        for of_side in dict.fromkeys(map(side, settings)):
            grid = {name: runs for name, runs in settings.items() if side(name) == of_side}
            seeds = max(map(len, grid.values()))
            means = {name: fmean(map(final, runs.values())) for name, runs in grid.items() if len(runs) == seeds}
            listed = ", ".join(f"{name} {gold:.3f}" for name, gold in sorted(means.items(), key=lambda item: -item[1]))
            rows.append([problem, str(answers), str(steps), of_side, str(len(grid)), str(seeds), listed])
    return markdown_table(["problem", "answers", "steps", "arm", "settings", "seeds of the best", "the best"], rows)


def picture(blocks: dict[Block, dict[str, dict[int, Run]]], path: Path) -> None:
    """Gold over steps, a panel for each block. The range of gold fits all arms except the plain one."""
    drawing, panels = plt.subplots(1, len(blocks), figsize=(4.5 * len(blocks), 3.6), layout="constrained", squeeze=False)
    for axes, ((problem, answers, _), settings) in zip(panels[0], blocks.items(), strict=True):
        of_side = {side(name): list(runs.values()) for name, runs in settings.items()}
        for name in (name for name in ORDER if name in of_side):
            course(axes, of_side[name], "gold", COLOURS[name], "no penalty" if name == PLAIN else name)
        shown = [gold for name, runs in of_side.items() if name != PLAIN for gold in average(runs)]
        axes.set_ylim(min(shown) - 0.15, max(shown) + 0.1)
        axes.set_title(f"{TITLES[problem]}, {answers} answers a step", fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    panels[0][0].set_ylabel("gold: true worth of an answer", fontsize=9)
    panels[0][0].legend(frameon=False, fontsize=9)
    drawing.savefig(path, dpi=110)
    plt.close(drawing)


def average(runs: Sequence[Run]) -> list[float]:
    """Mean gold over seeds at each measured step."""
    return [fmean(golds) for golds in zip(*(column(one, "gold") for one in runs), strict=True)]


def report(runs: Sequence[Run], output: Path) -> None:
    """Write the tables to result.md, and the pictures."""
    blocks = by_setting(one for one in runs if one["stage"] == "reported")
    lines = []
    for (problem, answers, steps), settings in blocks.items():
        lines += [f"### {TITLES[problem]}, {answers} answers a step, {steps} steps", "", *table(settings), ""]
    lines += ["### Tuning", "", *tuning_table(one for one in runs if one["stage"] == "tuning")]
    rewrite(output / "result.md", "\n".join(lines), "# A KL penalty, and GR on top of it")
    picture(blocks, output / "result.png")
    first = min(steps for _, _, steps in blocks)
    small = min(answers for _, answers, _ in blocks)
    shown = {block: blocks[block] for block in blocks if block[0] != "judge" and block[1:] == (small, first)}
    picture(shown, output / "readme.png")
