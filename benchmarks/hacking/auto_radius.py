"""Does ``radius="auto"`` train as well as the best fixed radius, where the passes compute in bf16?

    python -m benchmarks.hacking.auto_radius          # half an hour on one core; a study that was stopped continues

GR sequence at the strengths that tuning chose, in bf16 autocast over float32 weights, once with ``auto`` and once with each
radius of a grid. Nothing else differs.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

# Before torch is imported: one process on one core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.common.results import todays
from benchmarks.common.tables import markdown_table
from benchmarks.hacking.arms import Arm
from benchmarks.hacking.kl_and_gr import Laboratory, arm
from benchmarks.hacking.kl_and_gr_tables import TITLES, Run, grouped, name, spread
from benchmarks.hacking.report import rewrite
from benchmarks.hacking.study import final
from benchmarks.hacking.world import Scale

RADII = ("auto", 0.003, 0.01, 0.03, 0.1)
SEEDS = range(22, 28)
PENALTIES = {"loophole": {"strength": 0.3}, "learned": {"beta": 0.3, "strength": 1.0}}


def arms(problem: str) -> list[Arm]:
    """One for each radius, with the checks and the shrinking that are the default."""
    base = arm(**PENALTIES[problem])
    settings = {**base.wrapper, "eps": None, "shrink": True, "check_every": None}
    trainer = {**base.trainer, "bf16": True}
    return [
        replace(base, name=f"radius-{radius}", wrapper={**settings, "radius": radius}, trainer=trainer) for radius in RADII
    ]


def table(runs: list[Run]) -> list[str]:
    """A row for each radius: gold at the end, what ``auto`` gains over it, paired by seed, and figures of the last step."""
    rows = []
    for (problem, *_), found in grouped(runs, name).items():
        auto = found["radius-auto"]
        for radius, ours in found.items():
            gain = spread((final(auto[seed]) - final(one) for seed, one in ours.items()), "+") if ours is not auto else ""
            last = [one["curve"][-1] for one in ours.values()]
            ranges = [[point[figure] for point in last if figure in point] for figure in ("radius", "self_check")]
            cells = [f"{min(values):.2g} to {max(values):.2g}" if values else "" for values in ranges]
            setting = radius.removeprefix("radius-")
            rows.append([TITLES[problem], setting, str(len(ours)), spread(map(final, ours.values())), gain, *cells])
    head = ["problem", "radius", "seeds", "gold at the end", "auto gains over it", "last radius", "last self-check"]
    return markdown_table(head, rows)


def main(argv: list[str]) -> None:
    """Run what is missing, and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hacking.auto_radius", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/kl-and-gr"), help="where the worlds are kept")
    parser.add_argument("--output", type=Path, default=todays("hacking-auto-radius").parent, help="folder of the results")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    lab = Laboratory(args.output / "result.jsonl", args.folder, Scale(measure_every=20))
    for problem in PENALTIES:
        lab.runs(problem, arms(problem), SEEDS, "radius")
        rewrite(
            args.output / "result.md",
            "\n".join(table(list(lab.done.values()))),
            "# The radius that finds itself, in training",
        )


if __name__ == "__main__":
    main(sys.argv[1:])
