"""The tables and pictures of :mod:`benchmarks.hacking.kl_and_gr`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import ceil
from pathlib import Path
from statistics import fmean

import matplotlib.pyplot as plt

from benchmarks.common.tables import markdown_table
from benchmarks.hacking.arms import PLAIN, Run
from benchmarks.hacking.report import course, rewrite
from benchmarks.hacking.study import final
from benchmarks.hacking.summary import column, interval

Block = tuple[str, int, int]
"""A problem, the answers a step and the steps."""
KL, PAIR, GR = "KL", "KL + GR", "GR"
SAME_KL = "KL as in KL + GR"
"""The KL penalty of the best pair without GR, if it is not KL itself. Its runs have this stage."""
ORDER = [PLAIN, GR, KL, SAME_KL, PAIR]
COLOURS = dict(zip(ORDER, ("black", "tab:orange", "tab:blue", "tab:cyan", "tab:green"), strict=True))
FRONT = [("learned", 64, 120), ("loophole", 64, 120)]
"""What the README shows."""
TITLES = {"learned": "Learned reward", "loophole": "Verifier with a loophole", "judge": "LLM judge"}


def name(one: Run) -> str:
    """The name of a run's setting."""
    return str(one["arm"]["name"])


def side(one: Run) -> str:
    """The arm of a run, as tables and pictures name it."""
    if one["stage"] == SAME_KL or name(one) == PLAIN:
        return SAME_KL if one["stage"] == SAME_KL else PLAIN
    return " + ".join(word for word, part in ((KL, "kl-"), (GR, "gr-")) if part in name(one))


def grouped(runs: Iterable[Run], label: Callable[[Run], str]) -> dict[Block, dict[str, dict[int, Run]]]:
    """Runs by problem, answers a step and steps, then by their label, then by seed."""
    found: dict[Block, dict[str, dict[int, Run]]] = {}
    for one in runs:
        block = found.setdefault((one["problem"], one["answers"], one["steps"]), {})
        block.setdefault(label(one), {})[one["seed"]] = one
    return found


def spread(values: Iterable[float], sign: str = "") -> str:
    """Mean and 95% bootstrap interval."""
    of = interval(list(values))
    return f"{of['mean']:{sign}.3f} ({of['low']:.3f} to {of['high']:.3f})"


def table(arms: dict[str, dict[int, Run]]) -> list[str]:
    """A row for each arm: gold at the end, and what the last arm, KL + GR, gains over it, paired by seed."""
    rows = []
    for arm in (arm for arm in ORDER if arm in arms):
        runs, best = arms[arm], arms.get(PAIR, {})
        both = sorted(runs.keys() & best.keys())
        gain = (
            spread((final(best[seed]) - final(runs[seed]) for seed in both), "+")
            if both and arm != PAIR
            else ""
        )
        peaks, distance = ([figure(one) for one in runs.values()] for figure in (peak, distance_at_end))
        ends = spread(final(one) for one in runs.values())
        setting = name(next(iter(runs.values())))
        rows.append(
            [arm, setting, str(len(runs)), ends, gain, f"{fmean(peaks):.2f}", f"{fmean(distance):.1f}"]
        )
    head = [
        "arm",
        "setting",
        "seeds",
        "gold at the end",
        f"{PAIR} gains over it",
        "highest gold",
        "KL at the end",
    ]
    return markdown_table(head, rows)


def peak(one: Run) -> float:
    """The highest gold of a run."""
    return float(max(column(one, "gold")))


def distance_at_end(one: Run) -> float:
    """KL from the start at the end of a run, in nats for each answer."""
    return float(one["curve"][-1]["kl"])


def tuning_table(tried: Sequence[Run]) -> list[str]:
    """What each arm was tuned over: mean gold at the end, of the settings that ran on most seeds."""
    rows = []
    for arm in (arm for arm in ORDER if arm in map(side, tried)):
        for (problem, answers, steps), grid in grouped(
            (one for one in tried if side(one) == arm), name
        ).items():
            seeds = max(map(len, grid.values()))
            means = {
                setting: fmean(map(final, runs.values()))
                for setting, runs in grid.items()
                if len(runs) == seeds
            }
            listed = ", ".join(
                f"{setting} {gold:.3f}" for setting, gold in sorted(means.items(), key=lambda item: -item[1])
            )
            rows.append([problem, str(answers), str(steps), arm, str(len(grid)), str(seeds), listed])
    head = ["problem", "answers", "steps", "arm", "settings", "seeds of the best", "the best"]
    return markdown_table(head, rows)


def picture(blocks: dict[Block, dict[str, dict[int, Run]]], path: Path) -> None:
    """Gold over steps, a panel for each block. The range of gold fits all arms except the plain one."""
    rows, columns = ceil(len(blocks) / 3), min(3, len(blocks))
    drawing, panels = plt.subplots(
        rows, columns, figsize=(4.5 * columns, 3.6 * rows), layout="constrained", squeeze=False
    )
    for axes in panels.flat[len(blocks) :]:
        axes.set_visible(False)
    for axes, ((problem, answers, _), arms) in zip(panels.flat, blocks.items(), strict=False):
        curves = {arm: list(arms[arm].values()) for arm in ORDER if arm in arms}
        for arm, runs in curves.items():
            course(axes, runs, "gold", COLOURS[arm], "no penalty" if arm == PLAIN else arm)
        shown = [gold for arm, runs in curves.items() if arm != PLAIN for gold in average(runs)]
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
    blocks = grouped((one for one in runs if one["stage"] != "tuning"), side)
    lines = []
    for (problem, answers, steps), arms in blocks.items():
        lines += [f"### {TITLES[problem]}, {answers} answers a step, {steps} steps", "", *table(arms), ""]
    lines += ["### Tuning", "", *tuning_table([one for one in runs if one["stage"] == "tuning"])]
    rewrite(output / "result.md", "\n".join(lines), "# A KL penalty, and GR on top of it")
    picture(blocks, output / "result.png")
    front = {
        block: {arm: of for arm, of in blocks[block].items() if arm != SAME_KL}
        for block in FRONT
        if block in blocks
    }
    picture(front, output / "readme.png")
