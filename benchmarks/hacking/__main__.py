"""Does gradient regularization keep a policy from hacking its reward?

    python -m benchmarks.hacking                      # the case that matters, in minutes
    python -m benchmarks.hacking --study full         # every arm, tuned, and then reported on other seeds

The study is small, but its parts are real. TRL's ``SFTTrainer`` trains a transformer on a synthetic language.
``RewardTrainer`` trains a reward model, the proxy, on noisy pairs of the transformer's answers.
``GRPOTrainer`` maximises the proxy, with ``GradRegOptimizer`` as its optimizer. The true worth of an answer,
gold, is computed by a program and never trained on (:mod:`benchmarks.hacking.language`). Each seed has its
own policy and proxy, which all arms share.

The arms are those of :mod:`benchmarks.hacking.arms`. In the full study each family has the same number of
settings, which run on seeds that are not reported. The setting with the highest final gold is run again with
factors on the learning rate, and the best of those runs on the reported seeds.

The small study is one case: a verifier with a loophole and 256 answers a step. It compares the plain run
with the KL penalty that was tuned for it; with GR of the whole step and of micro-batches of 64, both at the
strength that was best with 64 answers; and with what ``attach(trainer)`` does where nothing is chosen.

Two other rewards can be hacked (:mod:`benchmarks.hacking.rewards`). ``--reward judge`` adds a format and a
grade, as LLM judges give them. ``--reward loophole`` is a verifier that is right, except for answers that
break it. With given ``--arms`` or in the full study the reward is the learned one, and a step has 64 answers,
unless the flags say otherwise.

Each run is a file in ``--folder`` and is not repeated if the file exists. So a study that was stopped
continues, and more ``--seeds`` add to it. Any settings can be compared without tuning, at any length::

    python -m benchmarks.hacking --arms kl-0.3 gr-sequence-1-rate-0.5 --steps 360 --seeds 4 --folder runs/long

Tables, picture and figures go to ``--output`` with the suffixes .md, .png and .json. If the .md file exists,
only the part between its marks is replaced.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

# Before torch is imported: each run is one process on one core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks.common.arguments import at_least
from benchmarks.common.results import stamp
from benchmarks.hacking import arms
from benchmarks.hacking.arms import LOWER, PLAIN, STOPPED, Run, Runs
from benchmarks.hacking.report import gain_table, main_table, measures_table, picture, rewrite, words_around
from benchmarks.hacking.study import Study, by_family, final, stopping_step, tuned
from benchmarks.hacking.summary import summarise
from benchmarks.hacking.world import Scale, scale_fields

PROGRAM = "benchmarks.hacking"
TUNING_SEEDS, REPORTED_SEEDS = 2, 10
"""How many seeds the full study tunes on, and the first seed that is reported."""
BASELINES = (PLAIN, STOPPED, LOWER, "KL penalty", "GR sequence")
"""The families over which the tables show gains; of given settings, KL penalties and lower rates."""
LEGEND = """Means over seeds with 95% bootstrap intervals. "At 70% proxy" is where a run first reaches 70% of
the gain in proxy of the plain run of its seed. If only some seeds have a value, the mean is over those, and
the cell says how many. "‖g1‖ and accuracy" is Spearman's rank correlation, over a run, of ‖g1‖ with the
proxy's accuracy on the policy's answers."""
TITLE = "# Reward hacking at small scale"
CASE: dict[str, Any] = {"reward": "loophole", "scale_rewards": "none", "prompts_per_step": 32}
"""The scale of the small study, where no flag says otherwise."""
Parts = dict[str, Runs]
"""The reported runs of each table, by its title. Every table has the plain runs."""


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m {PROGRAM}", description=__doc__.splitlines()[0])
    parser.add_argument("--study", choices=["small", "full"], default="small")
    parser.add_argument("--seeds", type=at_least(1), default=None, help="reported seeds; default: 2, full: 8")
    parser.add_argument("--tuning-seeds", type=at_least(1), default=TUNING_SEEDS, help="of the full study")
    parser.add_argument("--arms", nargs="*", default=None, help="settings, or families of the full study")
    parser.add_argument("--ablations", action="store_true", help="run the full study's ablations as well")
    parser.add_argument("--jobs", type=at_least(1), default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--folder", type=Path, default=Path("runs/reward-hacking"), help="of the runs")
    parser.add_argument("--output", type=Path, default=None, help="path of the results, without suffix")
    scale = parser.add_argument_group("scale", "what changes the outcome; a folder holds one scale")
    for name, kind in scale_fields().items():
        scale.add_argument(f"--{name.replace('_', '-')}", type=kind, default=None)
    return parser.parse_args(argv)


def small(study: Study, args: argparse.Namespace) -> tuple[Parts, dict[str, Any]]:
    """Compare the plain run with given settings or those of the case, without tuning."""
    names = dict.fromkeys([PLAIN, *(args.arms or ())])
    chosen = {name: arms.named(name) for name in names} if args.arms else arms.CASE
    seeds = range(REPORTED_SEEDS, REPORTED_SEEDS + args.seeds)
    reported = study.runs(chosen.values(), seeds, "reward hacking")
    title = "Settings as given" if args.arms else "Where a penalty of the step fades"
    return {title: by_family(chosen, reported)}, {}


def full(study: Study, args: argparse.Namespace) -> tuple[Parts, dict[str, Any]]:
    """Tune every family, its learning rate last, then run the chosen settings on other seeds."""
    families = [PLAIN, *(family for family in args.arms or arms.FAMILIES if family != PLAIN)]
    if args.ablations and "GR sequence" not in families:
        raise ValueError("--ablations are those of 'GR sequence': name it among --arms")
    if unknown := set(families) - set(arms.FAMILIES):
        raise ValueError(f"--arms {' '.join(sorted(unknown))}: must be among {', '.join(arms.FAMILIES)}")
    grids = {family: arms.FAMILIES[family] for family in families}
    tuning = study.runs((arm for grid in grids.values() for arm in grid), range(args.tuning_seeds), "tuning")
    at_full_rate = tuned(grids, tuning)
    rates = {family: [arms.at_rate(arm, rate) for rate in arms.RATES] for family, arm in at_full_rate.items()}
    settings = [arm for grid in rates.values() for arm in grid]
    tried = study.runs(settings, range(args.tuning_seeds), "tuning the rate")
    of_rate = tuned(rates, tried)
    chosen = {PLAIN: at_full_rate[PLAIN], LOWER: of_rate.pop(PLAIN), **of_rate}
    parts = {"At the full learning rate": at_full_rate, "With the learning rate tuned": chosen}
    if args.ablations:
        whole = at_full_rate["GR sequence"]
        parts["Ablations, at the full learning rate"] = {
            PLAIN: chosen[PLAIN],
            "GR sequence": whole,
            **arms.ablations(whole),
        }
    seeds = range(REPORTED_SEEDS, REPORTED_SEEDS + args.seeds)
    reported = study.runs((arm for part in parts.values() for arm in part.values()), seeds, "reported")
    ends: dict[str, dict[int, float]] = {}
    for one in [*tuning, *tried]:
        ends.setdefault(one["arm"]["name"], {})[one["seed"]] = final(one)
    stop = stopping_step(tuning)
    found = {title: by_family(part, reported, stop) for title, part in parts.items()}
    return found, {"final gold while tuning": ends}


def worlds(study: Study, seeds: Iterable[int]) -> dict[int, float]:
    """The proxy's accuracy on unseen pairs of the initial policy, by seed."""
    return {
        s: json.loads((study.folder / f"world-{s}" / "world.json").read_text())["proxy_accuracy"]
        for s in seeds
    }


def tables(
    summaries: dict[str, dict[str, Any]], accuracy: dict[int, float], stamped: dict[str, str]
) -> list[str]:
    """The lines of the generated part of the document: stamp and tables."""
    right = ", ".join(f"{value:.2f}" for value in accuracy.values())
    lines = [f"- {name}: {value}" for name, value in stamped.items()]
    lines += [
        f"- seeds: {len(accuracy)}; accuracy of their proxies on unseen pairs of the initial policy: {right}",
        "",
        LEGEND,
    ]
    for title, summary in summaries.items():
        baselines = [name for name in summary if name in BASELINES or name.startswith(("kl-", "rate-"))]
        lines += [
            "",
            f"### {title}",
            "",
            *main_table(summary),
            "",
            *gain_table(summary, baselines, ("final",)),
        ]
        lines += ["", *measures_table(summary)]
    return lines


def main(argv: list[str]) -> None:
    """Run the study and write its result.

    Raises:
        SystemExit: a value on the command line does not work; the message is one line.
    """
    args = parse_arguments(argv)
    args.seeds = args.seeds or (2 if args.study == "small" else 8)
    given = {name: getattr(args, name) for name in scale_fields() if getattr(args, name) is not None}
    scale = Scale(**(given if args.arms or args.study == "full" else CASE | given))
    output = args.output or args.folder / f"{date.today()}-reward-hacking"
    try:
        words_around(output.with_suffix(".md"), TITLE)  # before anything is run
        study = Study(args.folder, scale, args.jobs)
        write(*(small if args.study == "small" else full)(study, args), study, output)
    except ValueError as error:
        sys.exit(f"{PROGRAM}: {error}")


def write(parts: Parts, extra: dict[str, Any], study: Study, output: Path) -> None:
    """Print the tables; write them, the picture and all figures."""
    first = next(iter(parts.values()))
    accuracy, stamped = worlds(study, sorted(one["seed"] for one in first[PLAIN])), stamp()
    summaries = {title: summarise(runs) for title, runs in parts.items()}
    text = "\n".join(tables(summaries, accuracy, stamped))
    rewrite(output.with_suffix(".md"), text, TITLE)
    answers = study.scale.prompts_per_step * study.scale.generations
    what = f"{study.scale.reward} reward, {answers} answers a step"
    title = f"GRPO against a reward that can be hacked ({what}), {len(accuracy)} seeds"
    picture(parts, output.with_suffix(".png"), title)
    record = {
        "stamp": stamped,
        "scale": asdict(study.scale),
        "proxy_accuracy": accuracy,
        "summary": summaries,
        **extra,
    }
    every = {one["arm"]["name"]: group for runs in parts.values() for group in runs.values() for one in group}
    record["runs"] = {name: [rounded(one) for one in group] for name, group in every.items()}
    output.with_suffix(".json").write_text(json.dumps(record, separators=(",", ":")) + "\n")
    print(f"\n{text}\nwritten to {output}.md, .png and .json")


def rounded(one: Run) -> Run:
    """A run, with its figures rounded to five digits."""
    curve = [
        {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in point.items()}
        for point in one["curve"]
    ]
    return {**one, "curve": curve}


if __name__ == "__main__":
    main(sys.argv[1:])
