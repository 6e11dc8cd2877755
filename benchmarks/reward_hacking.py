"""Does gradient regularization keep a policy from hacking a learned reward?

    python benchmarks/reward_hacking.py                      # none against GR on 2 seeds: minutes on two cores
    python benchmarks/reward_hacking.py --study full         # every arm, tuned and then reported on other seeds

A laboratory in small, of real parts: a transformer that TRL's ``SFTTrainer`` taught a synthetic language, a reward model
that ``RewardTrainer`` taught on noisy pairs of its answers, and ``GRPOTrainer`` that maximises this proxy, with
``GradRegOptimizer`` as its optimizer. What an answer is really worth, gold, is a program and never trained on
(``hacking/language.py``). Every seed has a policy and a proxy of its own, which all arms share.

The arms are those of ``hacking/arms.py``. In the full study each family has the same number of settings, run on seeds that
are not reported; the setting whose gold at the end is highest is run again at parts of the learning rate, and the best of
those goes on to the reported seeds. The small study takes the settings that the full one chose. ``--study noise`` asks
instead what the penalty of a plain run consists of (``hacking/noise.py``).

Other rewards that can be hacked (``hacking/rewards.py``): ``--reward judge``, a format and a grade, as LLM judges give
them, and ``--reward loophole``, a verifier that is right but for answers that break it.

A run is a file in ``--folder``; what is there is not run again, so a study that was stopped goes on where it stopped, and
more ``--seeds`` add to it. Any settings can be compared without tuning, at any length::

    python benchmarks/reward_hacking.py --arms kl-0.3 gr-sequence-1-rate-0.5 --steps 360 --seeds 4 --folder runs/long

Tables, picture and figures are written to ``--output`` with the suffixes .md, .png and .json. Of an .md file that is
there already only the part between its marks is replaced.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

# Before torch: a run is one process on one core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

try:
    from hacking.arms import FAMILIES, LOWER, PLAIN, RATES, SMALL, STOPPED, ablations, at_rate, named
    from hacking.noise import noise_table, study_noise
    from hacking.report import gain_table, main_table, measures_table, picture, rewrite, words_around
    from hacking.study import Study, by_family, final, stopping_step, tuned
    from hacking.summary import Run, Runs, summarise
    from hacking.world import Scale, scale_fields
    from step_cost import stamp
except ModuleNotFoundError as missing:
    sys.exit(f"reward_hacking.py: the package {missing.name!r} is not installed. Install the demo: pip install -e '.[demo]'")

TUNING_SEEDS, REPORTED_SEEDS = 2, 10
"""How many seeds the full study tunes on, and the first seed of those that are reported."""
BASELINES = (PLAIN, STOPPED, LOWER, "KL penalty", "GR sequence")
"""Over which the tables tell gains; where settings are given, over those of KL penalty and lower rate."""
LEGEND = """Means over seeds with 95% bootstrap intervals. At 70% proxy: where a run first reaches 70% of the gain in proxy
of the plain run of its seed. Where not all seeds have a value, the mean is of those that do, and says how many. ‖g1‖ and
accuracy: Spearman's rank correlation over a run, of ‖g1‖ with the proxy's accuracy on the policy's answers."""
TITLE = "# Reward hacking in a small laboratory"
Parts = dict[str, Runs]
"""The reported runs of each table, by its title. All have the plain runs."""


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="reward_hacking.py", description=__doc__.splitlines()[0])
    parser.add_argument("--study", choices=["small", "full", "noise"], default="small")
    parser.add_argument("--seeds", type=int, default=None, help="reported seeds (default: 2, or 8 of the other studies)")
    parser.add_argument("--tuning-seeds", type=int, default=TUNING_SEEDS, help="of the full study")
    parser.add_argument("--arms", nargs="*", default=None, help="settings of the small study, or families of the full one")
    parser.add_argument("--ablations", action="store_true", help="the full study's ablations as well")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes, one core each")
    parser.add_argument("--folder", type=Path, default=Path("runs/reward-hacking"), help="where the runs are kept")
    parser.add_argument("--output", type=Path, default=None, help="path of the results, without suffix")
    scale = parser.add_argument_group("scale", "what changes the outcome of a run; a folder holds runs of one scale")
    for name, kind in scale_fields().items():
        scale.add_argument(f"--{name.replace('_', '-')}", type=kind, default=getattr(Scale, name))
    return parser.parse_args(argv)


def small(study: Study, args: argparse.Namespace) -> tuple[Parts, dict[str, Any]]:
    """The plain run against given settings, without tuning."""
    chosen = {name: named(name) for name in dict.fromkeys([PLAIN, *(args.arms or SMALL)])}
    reported = study.runs(chosen.values(), range(REPORTED_SEEDS, REPORTED_SEEDS + args.seeds), "reward hacking")
    return {"Settings as given": by_family(chosen, reported)}, {}


def full(study: Study, args: argparse.Namespace) -> tuple[Parts, dict[str, Any]]:
    """Tune every family, its learning rate last, then run what was chosen on other seeds."""
    families = [PLAIN, *(family for family in args.arms or FAMILIES if family != PLAIN)]
    if args.ablations and "GR sequence" not in families:
        raise ValueError("--ablations are those of 'GR sequence': name it among --arms")
    if unknown := set(families) - set(FAMILIES):
        raise ValueError(f"--arms {' '.join(sorted(unknown))}: must be among {', '.join(FAMILIES)}")
    grids = {family: FAMILIES[family] for family in families}
    tuning = study.runs((arm for grid in grids.values() for arm in grid), range(args.tuning_seeds), "tuning")
    at_full_rate = tuned(grids, tuning)
    rates = {family: [at_rate(arm, rate) for rate in RATES] for family, arm in at_full_rate.items()}
    tried = study.runs((arm for grid in rates.values() for arm in grid), range(args.tuning_seeds), "tuning the rate")
    of_rate = tuned(rates, tried)
    chosen = {PLAIN: at_full_rate[PLAIN], LOWER: of_rate.pop(PLAIN), **of_rate}
    parts = {"At the full learning rate": at_full_rate, "With the learning rate tuned": chosen}
    if args.ablations:
        whole = at_full_rate["GR sequence"]
        parts["Ablations, at the full learning rate"] = {PLAIN: chosen[PLAIN], "GR sequence": whole, **ablations(whole)}
    seeds = range(REPORTED_SEEDS, REPORTED_SEEDS + args.seeds)
    reported = study.runs((arm for part in parts.values() for arm in part.values()), seeds, "reported")
    ends: dict[str, dict[int, float]] = {}
    for one in [*tuning, *tried]:
        ends.setdefault(one["arm"]["name"], {})[one["seed"]] = final(one)
    stop = stopping_step(tuning)
    return {title: by_family(part, reported, stop) for title, part in parts.items()}, {"final gold while tuning": ends}


def worlds(study: Study, seeds: Iterable[int]) -> dict[int, float]:
    """The proxy's accuracy on unseen pairs of the start, seed by seed."""
    return {s: json.loads((study.folder / f"world-{s}" / "world.json").read_text())["proxy_accuracy"] for s in seeds}


def tables(summaries: dict[str, dict[str, Any]], accuracy: dict[int, float], stamped: dict[str, str]) -> list[str]:
    """The account that the program can give: facts and tables."""
    right = ", ".join(f"{value:.2f}" for value in accuracy.values())
    lines = [f"- {name}: {value}" for name, value in stamped.items()]
    lines += [
        f"- seeds: {len(accuracy)}; accuracy of their proxies on unseen pairs of the start: {right}",
        "",
        LEGEND,
    ]
    for title, summary in summaries.items():
        baselines = [family for family in summary if family in BASELINES or family.startswith(("kl-", "rate-"))]
        lines += ["", f"### {title}", "", *main_table(summary), "", *gain_table(summary, baselines, ("final",))]
        lines += ["", *measures_table(summary)]
    return lines


def main(argv: list[str]) -> None:
    """Run the study and write what came out.

    Raises:
        SystemExit: something given on the command line does not work; the message is one line.
    """
    args = parse_arguments(argv)
    args.seeds = args.seeds or (2 if args.study == "small" else 8)
    scale = Scale(**{name: getattr(args, name) for name in scale_fields()})
    output = args.output or args.folder / f"{date.today()}-reward-hacking"
    try:
        words_around(output.with_suffix(".md"), TITLE)  # before anything is run
        study = Study(args.folder, scale, args.jobs)
        if args.study == "noise":
            write_noise(study, range(REPORTED_SEEDS, REPORTED_SEEDS + args.seeds), output)
        else:
            write(*(small if args.study == "small" else full)(study, args), study, output)
    except ValueError as error:
        sys.exit(f"reward_hacking.py: {error}")


def write(parts: Parts, extra: dict[str, Any], study: Study, output: Path) -> None:
    """Print the tables; write them, the picture and every figure."""
    first = next(iter(parts.values()))
    accuracy, stamped = worlds(study, sorted(one["seed"] for one in first[PLAIN])), stamp()
    summaries = {title: summarise(runs) for title, runs in parts.items()}
    text = "\n".join(tables(summaries, accuracy, stamped))
    rewrite(output.with_suffix(".md"), text, TITLE)
    picture(parts, output.with_suffix(".png"), f"GRPO against a reward that can be hacked, {len(accuracy)} seeds")
    record = {"stamp": stamped, "scale": asdict(study.scale), "proxy_accuracy": accuracy, "summary": summaries, **extra}
    every = {one["arm"]["name"]: group for runs in parts.values() for group in runs.values() for one in group}
    record["runs"] = {name: [rounded(one) for one in group] for name, group in every.items()}
    output.with_suffix(".json").write_text(json.dumps(record, separators=(",", ":")) + "\n")
    print(f"\n{text}\nwritten to {output}.md, .png and .json")


def write_noise(study: Study, seeds: Sequence[int], output: Path) -> None:
    """Print what the penalty of plain runs consists of, and write it."""
    found, stamped = study_noise(study, seeds), stamp()
    text = "\n".join([*(f"- {name}: {value}" for name, value in stamped.items()), "", *noise_table(found)])
    rewrite(output.with_suffix(".md"), text, TITLE)
    record = {"stamp": stamped, "scale": asdict(study.scale), "points": found}
    output.with_suffix(".json").write_text(json.dumps(record, separators=(",", ":")) + "\n")
    print(f"\n{text}\nwritten to {output}.md and .json")


def rounded(one: Run) -> Run:
    """A run with its figures rounded to five digits."""
    curve = [
        {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in point.items()}
        for point in one["curve"]
    ]
    return {**one, "curve": curve}


if __name__ == "__main__":
    main(sys.argv[1:])
