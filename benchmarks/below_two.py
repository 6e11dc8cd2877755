"""What is lost below two gradients a step: the difference on a part of the micro-batches, or in each k-th step only?

    python benchmarks/below_two.py                         # everything: about an hour on one CPU core
    python benchmarks/below_two.py --studies fraction      # one study; what others left in --folder stays in the document
    python benchmarks/below_two.py --toy --studies fraction reuse convergence    # seconds; shows that everything runs

Studies: ``fraction``: a part's difference against that of all micro-batches, on SmolLM2-135M and in the laboratory of reward
hacking. ``cost``: seconds of such steps in trainers. ``reuse``: what an old penalty tells of the one that a later step would
have had. ``convergence``: where ``every=k`` leads on a problem whose answer is known. ``hacking``: what is left of the gold
that regularization keeps. The document, a picture and all figures go to ``--output`` with the suffixes .md, .png and .json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

# Before torch: trainers and small problems run on one core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from below.known import convergence
from below.parts import part_figures, parts_of_real_batches
from below.report import document, picture
from below.reuse import reuse_figures, together
from below.trainers import WHOLE, arms, seconds_in_trainer
from below.windows import course, laboratory
from measuring import RESULTS, stamp

Study = Callable[[argparse.Namespace], Any]

LABORATORY_SEEDS = (10, 11)
SETTINGS = {"sequence": {"strength": 1.0, "resample": "sequence"}, "reuse": {"strength": 1.0}}
"""Of the wrapper in the laboratory: completions reweighted whole, and as published."""


def fraction(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Figures of windows of 16 micro-batches."""
    if args.toy:
        return list(parts_of_real_batches("random", [("policy", 1024, 0)]))
    batches = [(kind, 1024, seed) for seed in (0, 1) for kind in ("policy", "text")]
    found = list(parts_of_real_batches("smollm2", batches))
    for name, windows in _laboratory_windows(args.folder, 16):
        found += [{"problem": name, "batch": str(at), **part_figures(windows[at], 1.0)} for at in range(9, len(windows), 10)]
    return found


def reuse(args: argparse.Namespace) -> list[dict[str, Any]]:
    """How near old penalties come to new ones, 1 to 7 steps later."""
    lags, every = (1, 2, 3, 7), 4
    if args.toy:
        courses: list[tuple[str, Any]] = [("toy", course("random", "text", 256, 9, 1e-3))]
        return _of_courses(courses, lags, every)
    courses = list(_laboratory_windows(args.folder, 1))
    courses += [(f"random, text of {size} tokens", course("random", "text", size, 80, 1e-3)[20:]) for size in (256, 4096)]
    courses += [(f"smollm2, {kind} of 256 tokens", course("smollm2", kind, 256, 8, 1e-6)) for kind in ("policy", "text")]
    return _of_courses(courses, lags, every)


def _of_courses(courses: list[tuple[str, Any]], lags: tuple[int, ...], every: int) -> list[dict[str, Any]]:
    both = [(name, reuse_figures(windows, lags) + together(windows, every)) for name, windows in courses]
    return [{"problem": name, **row} for name, rows in both for row in rows]


def _laboratory_windows(folder: Path, accumulation: int) -> list[tuple[str, Any]]:
    from hacking.arms import EPS
    from hacking.study import quiet
    from hacking.world import Scale, prepare

    found = []
    for name, settings in SETTINGS.items():
        for seed in LABORATORY_SEEDS:
            with quiet():
                world = prepare(Scale(), seed, folder / "hacking" / f"world-{seed}")
                windows = laboratory(
                    {**settings, "eps": EPS, "check_every": 0}, accumulation, world, Scale(), seed, folder / "trainer"
                )
            found.append((f"laboratory, GRPO, {name}", windows))
    return found


def hacking(args: argparse.Namespace) -> dict[str, Any]:
    """Gold at the end of each arm; runs that ``--folder`` holds are not repeated."""
    from hacking.arms import FAMILIES, PLAIN
    from hacking.study import Study as Runs
    from hacking.summary import summarise
    from hacking.world import Scale

    study = Runs(args.folder / "hacking", Scale(), 1)
    chosen = {PLAIN: FAMILIES[PLAIN][0], **arms()}
    runs = study.runs(chosen.values(), range(10, 10 + args.seeds), "below two")
    summary = summarise({name: [one for one in runs if one["arm"]["name"] == name] for name in chosen})
    keep = ("final", "area", "final_proxy", "final_kl")
    return {
        name: {
            "seeds": row["seeds"],
            "figures": {key: row["figures"][key] for key in keep},
            "gain": {key: row["gain"].get(f"final over {key}") for key in (PLAIN, WHOLE)},
            "runs": [one["curve"][-1]["gold"] for one in runs if one["arm"]["name"] == name],
        }
        for name, row in summary.items()
    }


def cost(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds in SFT and GRPO."""
    from hacking.study import quiet

    rounds, width = (1, 64) if args.toy else (8, 256)
    with quiet():
        return [seconds_in_trainer(kind, rounds, width, args.folder / "trainer") for kind in ("SFT", "GRPO")]


def known(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Distances from the known answer."""
    return list(convergence(*((1, 8) if args.toy else (4, 3000))))


STUDIES: dict[str, Study] = {"fraction": fraction, "cost": cost, "reuse": reuse, "convergence": known, "hacking": hacking}


def main(argv: list[str]) -> None:
    """Run the studies that were asked for, and write the document of all that there are."""
    parser = argparse.ArgumentParser(
        prog="below_two.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--studies", nargs="*", choices=STUDIES, default=list(STUDIES), help="none: the document alone")
    parser.add_argument("--seeds", type=int, default=8, help="of the laboratory, from 10 on")
    parser.add_argument("--toy", action="store_true", help="small models and few steps")
    parser.add_argument("--folder", type=Path, default=Path("runs/below-two"), help="where figures and runs are kept")
    parser.add_argument("--output", type=Path, default=None, help="path of the results, without suffix")
    args = parser.parse_args(argv)
    output = args.output or RESULTS / f"{date.today()}-below-two"
    for folder in (args.folder, output.parent):
        folder.mkdir(parents=True, exist_ok=True)
    for name in args.studies:
        print(name, flush=True)
        record = {"stamp": stamp(), "figures": STUDIES[name](args)}
        (args.folder / f"{name}.json").write_text(json.dumps(record) + "\n")
    files = {name: args.folder / f"{name}.json" for name in STUDIES}
    found = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    output.with_suffix(".json").write_text(json.dumps(_rounded(found), separators=(",", ":")) + "\n")
    output.with_suffix(".md").write_text(document(found, output.name))
    picture({name: study["figures"] for name, study in found.items()}, output.with_suffix(".png"))
    print(f"written to {output}.md, .png and .json")


def _rounded(value: Any) -> Any:
    """Every number to four digits."""
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main(sys.argv[1:])
