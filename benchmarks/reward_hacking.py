"""Does gradient regularization keep a policy from hacking a learned reward?

    python benchmarks/reward_hacking.py                      # none against GR on 2 seeds: minutes on two cores
    python benchmarks/reward_hacking.py --study full         # every arm, tuned and then reported on other seeds

A laboratory in small, of real parts: a transformer that TRL's ``SFTTrainer`` taught a synthetic language, a proxy that
``RewardTrainer`` taught on noisy pairs of its answers, and ``GRPOTrainer`` that maximises the proxy, with
``GradRegOptimizer`` as its optimizer. What an answer is really worth, gold, is a program and never trained on
(``hacking/language.py``). Every seed has a policy and a proxy of its own, which all arms share.

The arms are those of ``hacking/arms.py``. In the full study each family has the same number of settings, run on seeds that
are not reported; the setting whose gold at the end is highest is then run on the reported seeds. The small study takes the
settings that the full one chose.

A run is a file in ``--folder``; what is there is not run again, so a study that was stopped goes on where it stopped, and
more ``--seeds`` add to it. Any settings can be compared without tuning, at any length::

    python benchmarks/reward_hacking.py --arms none kl-0.3 gr-sequence-1 --steps 360 --seeds 4 --folder runs/long

Table, picture and figures are written to ``--output`` with the suffixes .md, .png and .json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
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
    from hacking.arms import FAMILIES, PLAIN, SMALL, STOPPED, Arm, ablations
    from hacking.report import gain_table, main_table, picture
    from hacking.study import Study, by_family, candidates, stopping_step, tuned
    from hacking.summary import Run, Runs, summarise
    from hacking.world import Scale, scale_fields
    from step_cost import RESULTS, stamp
except ModuleNotFoundError as missing:
    sys.exit(f"reward_hacking.py: the package {missing.name!r} is not installed. Install the demo: pip install -e '.[demo]'")

TUNING_SEEDS, REPORTED_SEEDS = 2, 10
"""How many seeds the full study tunes on, and the first seed of those that are reported."""
BASELINES = (PLAIN, STOPPED, "lower rate", "KL penalty")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="reward_hacking.py", description=__doc__.splitlines()[0])
    parser.add_argument("--study", choices=["small", "full"], default="small")
    parser.add_argument("--seeds", type=int, default=None, help="reported seeds (default: 2, or 8 of the full study)")
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


def small(study: Study, args: argparse.Namespace) -> tuple[Runs, dict[str, Any]]:
    """The plain run against given settings, without tuning."""
    settings = {arm.name: arm for arm in candidates(list(FAMILIES))}
    names = dict.fromkeys([PLAIN, *(args.arms or SMALL)])
    if unknown := names.keys() - settings.keys():
        raise ValueError(f"--arms {' '.join(sorted(unknown))}: the small study takes settings, of {', '.join(settings)}")
    chosen = {name: settings[name] for name in names}
    seeds = range(REPORTED_SEEDS, REPORTED_SEEDS + args.seeds)
    reported = study.runs([(arm, seed) for seed in seeds for arm in chosen.values()], "reward hacking")
    return by_family(chosen, reported, None), {}


def full(study: Study, args: argparse.Namespace) -> tuple[Runs, dict[str, Any]]:
    """Tune every family, then run what was chosen on other seeds."""
    families = [PLAIN, *(family for family in args.arms or FAMILIES if family != PLAIN)]
    if args.ablations and "GR sequence" not in families:
        raise ValueError("--ablations are those of 'GR sequence': name it among --arms")
    unknown = set(families) - set(FAMILIES)
    if unknown:
        raise ValueError(f"--arms {' '.join(sorted(unknown))}: must be among {', '.join(FAMILIES)}")
    settings = candidates(families)
    tuning = study.runs([(arm, seed) for seed in range(args.tuning_seeds) for arm in settings], "tuning")
    chosen: dict[str, Arm] = tuned(families, tuning)
    if args.ablations:
        chosen |= ablations(chosen["GR sequence"])
    seeds = range(REPORTED_SEEDS, REPORTED_SEEDS + args.seeds)
    reported = study.runs([(arm, seed) for seed in seeds for arm in chosen.values()], "reported")
    scores = {arm.name: [one["curve"][-1]["gold"] for one in tuning if one["arm"]["name"] == arm.name] for arm in settings}
    return by_family(chosen, reported, stopping_step(tuning)), {"final gold while tuning, a seed each": scores}


def worlds(runs: Runs, study: Study) -> dict[int, float]:
    """The proxy's accuracy on unseen pairs of the start, seed by seed."""
    seeds = sorted({one["seed"] for group in runs.values() for one in group})
    return {s: json.loads((study.folder / f"world-{s}" / "world.json").read_text())["proxy_accuracy"] for s in seeds}


def document(runs: Runs, summary: dict[str, dict[str, Any]], accuracy: dict[int, float], stamped: dict[str, str]) -> str:
    """The account that the program can give: facts and tables."""
    facts = [f"- {name}: {value}" for name, value in stamped.items()]
    right = ", ".join(f"{value:.2f}" for value in accuracy.values())
    rho = summary[PLAIN]["mechanism"]
    known = "n/a" if rho["mean"] is None else f"{rho['mean']:.2f} ({rho['low']:.2f} to {rho['high']:.2f})"
    lines = [
        "# Reward hacking in a small laboratory",
        "",
        *facts,
        f"- seeds: {len(accuracy)}; accuracy of their proxies on unseen pairs of the start: {right}",
        f"- rank correlation of ‖g1‖ with the proxy's accuracy over the plain runs: {known}",
        "",
        "Means over seeds with 95% bootstrap intervals. At 70% proxy: where a run first reaches 70% of the gain in proxy of "
        "the plain run of its seed. Where not all seeds get there, the mean is of those that do, and says how many.",
        "",
        *main_table(summary),
        "",
        *gain_table(summary, BASELINES, ("final",)),
    ]
    return "\n".join([*lines, ""])


def main(argv: list[str]) -> None:
    """Run the study and write what came out.

    Raises:
        SystemExit: something given on the command line does not work; the message is one line.
    """
    args = parse_arguments(argv)
    args.seeds = args.seeds or (2 if args.study == "small" else 8)
    scale = Scale(**{name: getattr(args, name) for name in scale_fields()})
    folder_of_results = RESULTS if args.study == "full" else args.folder
    output = args.output or folder_of_results / f"{date.today()}-reward-hacking"
    try:
        study = Study(args.folder, scale, args.jobs)
        runs, extra = (small if args.study == "small" else full)(study, args)
    except ValueError as error:
        sys.exit(f"reward_hacking.py: {error}")
    write(runs, study, output, extra)


def write(runs: Runs, study: Study, output: Path, extra: dict[str, Any]) -> None:
    """Print the tables; write them, the picture and every figure."""
    summary, accuracy, stamped = summarise(runs), worlds(runs, study), stamp()
    text = document(runs, summary, accuracy, stamped)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".md").write_text(text)
    picture(runs, output.with_suffix(".png"), f"GRPO against a learned reward, {len(accuracy)} seeds")
    record = {"stamp": stamped, "scale": asdict(study.scale), "proxy_accuracy": accuracy, "summary": summary, **extra}
    record["runs"] = {family: [without_text(one) for one in group] for family, group in runs.items()}
    output.with_suffix(".json").write_text(json.dumps(record, indent=None, separators=(",", ":")) + "\n")
    print(f"\n{text}\nwritten to {output}.md, .png and .json")


def without_text(one: Run) -> Run:
    """A run with its figures rounded to five digits."""
    return {
        **one,
        "curve": [
            {name: float(f"{v:.5g}") if isinstance(v, float) else v for name, v in point.items()} for point in one["curve"]
        ],
    }


if __name__ == "__main__":
    main(sys.argv[1:])
