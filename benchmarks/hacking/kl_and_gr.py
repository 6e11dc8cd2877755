"""Does GR on top of a KL penalty add to the KL penalty alone, when both are tuned equally?

    python -m benchmarks.hacking.kl_and_gr            # hours on one core; a study that was stopped continues

The sides have equally many settings: KL penalties at some learning rates, and the same KL penalties with GR
(``resample="sequence"``) at as many strengths. All settings run on one seed, the best quarter on two more,
and the setting with the highest final gold over the three is reported, on other seeds. So is the KL penalty
of the best pair without GR. GR without a KL penalty is tuned in the same way. The settings that were found at
120 steps are also run for 240. Then, with 256 answers a step in place of 64, what ``WIDE_STAGES`` names is
tuned again, over fewer settings.

Each run is a line of ``--output``/result.jsonl, and a run that is there is not repeated. ``--report`` runs
nothing, and writes tables and pictures of the runs that are there. Tables replace the part of result.md
between its marks.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from statistics import fmean
from typing import Any

# Before torch is imported: one process on one core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tqdm import tqdm

from benchmarks.common.results import RESULTS
from benchmarks.hacking.arms import EPS, PLAIN, Arm, Run, at_rate
from benchmarks.hacking.kl_and_gr_tables import GR, KL, PAIR, SAME_KL, name, report
from benchmarks.hacking.run import train
from benchmarks.hacking.study import final, quiet
from benchmarks.hacking.world import Scale, World, prepare

PROBLEMS: dict[str, dict[str, Any]] = {
    "learned": {},
    "loophole": {"reward": "loophole", "scale_rewards": "none"},
    "judge": {"reward": "judge", "pairs": 300},
}
"""The settings of a scale that make a problem."""
TUNING_SEEDS, REPORTED_SEEDS = range(3), range(22, 34)
"""No run of an earlier study has a reported seed."""


def arm(*, beta: float = 0.0, strength: float = 0.0) -> Arm:
    """A KL penalty, GR, or both."""
    names = [f"kl-{beta:g}"] * bool(beta) + [f"gr-sequence-{strength:g}"] * bool(strength)
    whole = {"strength": strength, "eps": EPS, "norm_of": "step", "resample": "sequence"}
    wrapper = whole if strength else {"strength": 0.0}
    return Arm("-".join(names) or PLAIN, wrapper, {"beta": beta} if beta else {})


def sides(betas: Sequence[float], rates: Sequence[float], strengths: Sequence[float]) -> dict[str, list[Arm]]:
    """The settings over which each side is tuned: KL and KL + GR over as many, if rates and strengths are."""
    return {
        KL: [at_rate(arm(beta=beta), rate) for beta in betas for rate in rates],
        PAIR: [arm(beta=beta, strength=strength) for beta in betas for strength in strengths],
        GR: [at_rate(arm(strength=strength), rate) for strength in strengths for rate in rates],
        PLAIN: [arm()],
    }


SIDES = {
    "learned": sides((0.03, 0.1, 0.2, 0.3, 0.5), (1.0, 0.5, 0.25), (0.3, 1.0, 3.0)),
    "loophole": sides((0.03, 0.1, 0.3), (1.0, 0.5), (0.3, 1.0)),
    "judge": sides((0.03, 0.1, 0.3), (1.0, 0.5), (0.3, 1.0)),
}
LONG = {"learned": (KL, PAIR), "loophole": (KL, PAIR, GR), "judge": (KL, PAIR)}
"""What also runs for twice the steps."""
WIDE_SIDES = {
    "learned": sides((0.1, 0.2, 0.3), (1.0, 0.5), (1.0, 4.0)),
    "loophole": sides((0.03, 0.1, 0.3), (1.0, 0.5), (1.0, 4.0)),
}
"""The settings with four times the answers."""
WIDE_STAGES = (("learned", (KL, PAIR)), ("loophole", (KL, PAIR)), ("loophole", (GR,)))
STAGES = (
    ("learned", (KL, PAIR)),
    ("loophole", (KL, PAIR)),
    ("loophole", (GR,)),
    ("judge", (KL, PAIR)),
    ("learned", (PLAIN,)),
    ("loophole", (PLAIN,)),
    ("learned", (GR,)),
    ("judge", (GR, PLAIN)),
)
"""What is tuned, and then reported together; what matters most first."""


class Laboratory:
    """Runs, kept as lines of a file, in worlds that are kept in a folder."""

    def __init__(self, record: Path, folder: Path, sizes: Scale) -> None:
        self.record, self.folder, self.sizes = record, folder, sizes
        self.worlds: dict[tuple[str, int], World] = {}
        lines = record.read_text().splitlines() if record.exists() else []
        self.done: dict[tuple[Any, ...], Run] = {self.key(one): one for one in map(json.loads, lines)}

    @staticmethod
    def key(one: Run) -> tuple[Any, ...]:
        """What tells a run from the others."""
        return one["problem"], one["answers"], one["steps"], name(one), one["seed"]

    def world(self, problem: str, scale: Scale, seed: int) -> World:
        """The world of a problem and a seed. All problems of a seed begin with the same policy."""
        if (problem, seed) not in self.worlds:
            folder = self.folder / f"{problem}-{seed}"
            for other in PROBLEMS:
                made = self.folder / f"{other}-{seed}"
                if (made / "world.json").exists() and not folder.exists():
                    shutil.copytree(made / "policy", folder / "policy")
            self.worlds[problem, seed] = prepare(scale, seed, folder)
        return self.worlds[problem, seed]

    def runs(
        self,
        problem: str,
        settings: Collection[Arm],
        seeds: Sequence[int],
        title: str,
        *,
        times: int = 1,
        measure_every: int | None = None,
    ) -> list[Run]:
        """The runs of ``settings`` on ``seeds``, with ``times`` the steps."""
        sizes, found = self.sizes, []
        scale = replace(
            sizes,
            **PROBLEMS[problem],
            steps=times * sizes.steps,
            measure_every=measure_every or times * sizes.measure_every,
        )
        answers = scale.prompts_per_step * scale.generations
        tasks = [(setting, seed) for seed in seeds for setting in settings]
        for setting, seed in tqdm(tasks, desc=f"{problem}, {answers} answers, {scale.steps} steps: {title}"):
            key = (problem, answers, scale.steps, setting.name, seed)
            if key not in self.done:
                with quiet():
                    world = self.world(problem, scale, seed)
                    one = train(setting, world, scale, seed, self.folder / "trainer")
                self.keep(
                    {
                        "problem": problem,
                        "answers": answers,
                        "steps": scale.steps,
                        "stage": title,
                        **shortened(one),
                    }
                )
            found.append(self.done[key])
        return found

    def keep(self, one: Run) -> None:
        """Add a run to the file."""
        self.done[self.key(one)] = one
        with self.record.open("a") as file:
            file.write(json.dumps(one, separators=(",", ":")) + "\n")

    def tuned(self, problem: str, grid: Sequence[Arm]) -> Arm:
        """The setting with the highest final gold: all run on the first tuning seed, a quarter on all."""
        if len(grid) == 1:
            return grid[0]
        first, *others = TUNING_SEEDS
        kept = max(2, ceil(len(grid) / 4))
        ends = 10**6  # steps between measurements, so that there are two
        tried = self.runs(problem, grid, [first], "tuning", measure_every=ends)
        names = [name(one) for one in sorted(tried, key=final, reverse=True)[:kept]]
        best = [setting for setting in grid if setting.name in names]
        tried = self.runs(problem, best, [first, *others], "tuning", measure_every=ends)
        return max(best, key=lambda setting: fmean(final(one) for one in tried if name(one) == setting.name))


def shortened(one: Run) -> Run:
    """A run without its example answers, its figures rounded to four digits."""
    curve = [
        {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in point.items()}
        for point in one["curve"]
    ]
    return {
        **one,
        "curve": [{name: value for name, value in point.items() if name != "example"} for point in curve],
    }


def tune_and_report(
    lab: Laboratory, stages: Sequence[tuple[str, tuple[str, ...]]], grids: dict[str, dict[str, list[Arm]]]
) -> dict[str, dict[str, Arm]]:
    """Tune each side, and run what was chosen on the reported seeds. Returns what was chosen."""
    chosen: dict[str, dict[str, Arm]] = {problem: {} for problem in PROBLEMS}
    for problem, arms in stages:
        found = {side: lab.tuned(problem, grids[problem][side]) for side in arms}
        report_on(lab, problem, found)
        chosen[problem] |= found
    return chosen


def report_on(lab: Laboratory, problem: str, found: dict[str, Arm], times: int = 1) -> None:
    """Run ``found``, and the KL penalty of the pair among them without GR, on the reported seeds."""
    lab.runs(problem, found.values(), REPORTED_SEEDS, "reported", times=times)
    if PAIR in found:
        same = arm(beta=found[PAIR].trainer["beta"])
        lab.runs(problem, [same], REPORTED_SEEDS, "reported" if same == found[KL] else SAME_KL, times=times)


def main(argv: list[str]) -> None:
    """Run what is missing of the study, and report it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.hacking.kl_and_gr", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--report", action="store_true", help="run nothing: write tables and pictures")
    parser.add_argument("--folder", type=Path, default=Path("runs/kl-and-gr"), help="of the worlds")
    parser.add_argument("--output", type=Path, default=RESULTS / "2026-11-26-kl-and-gr", help="folder")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    record, scale = args.output / "result.jsonl", Scale(measure_every=20)
    lab = Laboratory(record, args.folder, scale)
    if not args.report:
        chosen = tune_and_report(lab, STAGES, SIDES)
        for problem, arms in LONG.items():
            report_on(lab, problem, {side: chosen[problem][side] for side in arms}, times=2)
        lab = Laboratory(record, args.folder, replace(scale, prompts_per_step=4 * scale.prompts_per_step))
        tune_and_report(lab, WIDE_STAGES, WIDE_SIDES)
    report(list(lab.done.values()), args.output)


if __name__ == "__main__":
    main(sys.argv[1:])
