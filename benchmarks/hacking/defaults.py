"""Does GR hold with nothing chosen, as ``attach(trainer)`` has it, where its settings were tuned before?

    python -m benchmarks.hacking.defaults             # an hour on one core; what was stopped continues
    python -m benchmarks.hacking.defaults --aim 1     # as if strength="auto" aimed at another ratio
    python -m benchmarks.hacking.defaults --report    # runs nothing: writes the tables of what is there

Behind the loophole GR stands alone. With the learned reward it stands on a KL penalty, β 0.2 as tuned for
:mod:`benchmarks.hacking.kl_and_gr`, and is compared with that penalty alone. Both have 64 or 256 answers a
step, in micro-batches of 64. Each run is a line of ``--output``/result.jsonl, and a run that is there is not
repeated. Tables replace the part of result.md between its marks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from benchmarks.common.results import RESULTS
from benchmarks.common.tables import markdown_table
from benchmarks.hacking.arms import MICRO_BATCH, WHOLE, Arm, Run, nothing_chosen
from benchmarks.hacking.kl_and_gr import Laboratory
from benchmarks.hacking.kl_and_gr_tables import TITLES, grouped, name, spread
from benchmarks.hacking.report import rewrite
from benchmarks.hacking.study import final
from benchmarks.hacking.world import Scale
from gradreg_optim.core import strength as rule

SEEDS = range(22, 28)
"""The first of those that were reported for tuned settings."""
TITLE = "# The defaults in the laboratory of reward hacking"


def kl_alone(beta: float) -> Arm:
    """The KL penalty with which GR on top of it is compared."""
    return Arm(f"kl-{beta:g}", {"strength": 0.0}, {"beta": beta}, micro_batch=MICRO_BATCH)


Cells = Sequence[tuple[str, int, Sequence[Arm]]]
"""Problem, answers a step, arms."""
CELLS: Cells = (
    ("loophole", 64, [nothing_chosen()]),
    ("loophole", 256, [nothing_chosen()]),
    ("learned", 64, [nothing_chosen(beta=0.2), kl_alone(0.2)]),
    ("learned", 256, [nothing_chosen(beta=0.2), kl_alone(0.2)]),
    ("learned", 64, [nothing_chosen(beta=0.3), kl_alone(0.3)]),
    ("learned", 64, [nothing_chosen()]),
    ("loophole", 256, [WHOLE]),
)
"""What matters most first."""


def table(arms: Mapping[str, Mapping[int, Run]]) -> list[str]:
    """A row for each arm: gold at the end, and what GR adds to the same KL penalty, paired by seed."""
    rows = []
    for setting, runs in arms.items():
        ends = {seed: final(one) for seed, one in sorted(runs.items())}
        alone = arms.get(setting.partition("-default")[0], {}) if "-default" in setting else {}
        both = sorted(ends.keys() & alone.keys())
        gain = spread((ends[seed] - final(alone[seed]) for seed in both), "+") if both else ""
        found = [one["curve"][-1].get("strength") for _, one in sorted(runs.items())]
        rows.append(
            [
                setting,
                str(len(ends)),
                spread(ends.values()),
                f"{min(ends.values()):.3f}",
                " ".join(f"{gold:.2f}" for gold in ends.values()),
                gain,
                f"{fmean(one['curve'][-1]['kl'] for one in runs.values()):.1f}",
                " ".join(f"{gamma:.2f}" for gamma in found if gamma is not None and gamma > 1e-6),
                f"{fmean(one['seconds_per_step'] for one in runs.values()):.2f}",
            ]
        )
    head = ["arm", "seeds", "gold at the end", "lowest", "each seed", "over the KL penalty alone"]
    return markdown_table([*head, "KL at the end", "γ", "seconds a step"], rows)


def report(runs: Sequence[Run], output: Path) -> None:
    """Write the tables to result.md."""
    lines = []
    for (problem, answers, _), arms in sorted(grouped(runs, name).items(), reverse=True):
        lines += [
            f"### {TITLES[problem]}, {answers} answers a step",
            "",
            *table(dict(sorted(arms.items()))),
            "",
        ]
    rewrite(output / "result.md", "\n".join(lines[:-1]), TITLE)


def run(record: Path, folder: Path, cells: Cells, seeds: Sequence[int], aim: float | None = None) -> None:
    """Run what is missing; with an ``aim``, only the arms whose strength it changes, under other names."""
    for problem, answers, arms in cells:
        if aim is not None:
            rule.AIM = aim
            arms = [replace(arm, name=f"{arm.name}-aim-{aim:g}") for arm in arms if not arm.wrapper]
        scale = Scale(measure_every=20)
        scale = replace(scale, prompts_per_step=answers // scale.generations)
        Laboratory(record, folder, scale).runs(problem, arms, seeds, "reported")


def main(argv: list[str]) -> None:
    """Run what is missing of the study, and report it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.hacking.defaults", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--report", action="store_true", help="run nothing: write the tables")
    parser.add_argument("--aim", type=float, default=None, help="of strength='auto'; default: the package's")
    parser.add_argument("--folder", type=Path, default=Path("runs/defaults"), help="of the worlds")
    parser.add_argument(
        "--output", type=Path, default=RESULTS / "2026-12-01-defaults-in-the-laboratory", help="folder"
    )
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    record = args.output / "result.jsonl"
    if not args.report:
        run(record, args.folder, CELLS, SEEDS, args.aim)
    report(list(Laboratory(record, args.folder, Scale()).done.values()), args.output)


if __name__ == "__main__":
    main(sys.argv[1:])
