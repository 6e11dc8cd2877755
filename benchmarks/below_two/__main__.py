"""What is lost with fewer than two gradients in a step: ``fraction`` of the micro-batches, or every k-th step only?

    python -m benchmarks.below_two                         # everything: about an hour on one CPU core
    python -m benchmarks.below_two --studies fraction      # one study; the document keeps earlier results in --folder
    python -m benchmarks.below_two --toy --studies fraction convergence    # seconds, to see that everything runs

The studies:

- ``fraction``     the difference on a part of the micro-batches compared with that on all of them, on SmolLM2-135M and on
                   GRPO batches of the reward-hacking benchmark
- ``cost``         seconds of such steps in trainers
- ``convergence``  the minimum that ``every=k`` reaches on a problem with a known solution
- ``hacking``      final gold in the reward-hacking benchmark

The document, a picture and all figures go to ``--output`` with the suffixes .md, .png and .json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before torch is imported: trainers and small problems run on one core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tqdm import tqdm

from benchmarks.below_two.known import convergence
from benchmarks.below_two.parts import part_figures, parts_of_real_batches
from benchmarks.below_two.report import document, picture
from benchmarks.below_two.trainers import WHOLE, arms, seconds_in_trainer
from benchmarks.below_two.windows import windows_of_run
from benchmarks.common.arguments import at_least
from benchmarks.common.results import stamp, todays

Study = Callable[[argparse.Namespace], Any]

HACKING_SEEDS = (10, 11)
SETTINGS = {"sequence": {"strength": 1.0, "resample": "sequence"}, "reuse": {"strength": 1.0}}
"""Settings of the wrapper in the reward-hacking runs: reweighted completions, and as published."""


def fraction(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The figures of windows of 16 micro-batches."""
    if args.toy:
        return list(parts_of_real_batches("random", [("policy", 1024, 0)]))
    batches = [(kind, 1024, seed) for seed in (0, 1) for kind in ("policy", "text")]
    found = list(tqdm(parts_of_real_batches("smollm2", batches), "batches", len(batches)))
    for name, windows in _hacking_windows(args.folder, 16):
        found += [{"problem": name, "batch": str(at), **part_figures(windows[at], 1.0)} for at in range(9, len(windows), 10)]
    return found


def _hacking_windows(folder: Path, accumulation: int) -> list[tuple[str, Any]]:
    from benchmarks.hacking.arms import EPS
    from benchmarks.hacking.study import quiet
    from benchmarks.hacking.world import Scale, prepare

    found = []
    for name, settings in SETTINGS.items():
        for seed in HACKING_SEEDS:
            with quiet():
                world = prepare(Scale(), seed, folder / "hacking" / f"world-{seed}")
                windows = windows_of_run(
                    {**settings, "eps": EPS, "check_every": 0}, accumulation, world, Scale(), seed, folder / "trainer"
                )
            found.append((f"reward hacking, GRPO, {name}", windows))
    return found


def hacking(args: argparse.Namespace) -> dict[str, Any]:
    """The final gold of each arm. Runs that ``--folder`` holds are not repeated."""
    from benchmarks.hacking.arms import FAMILIES, PLAIN
    from benchmarks.hacking.study import Study as Runs
    from benchmarks.hacking.summary import summarise
    from benchmarks.hacking.world import Scale

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
    """The seconds of a step in SFT and GRPO."""
    from benchmarks.hacking.study import quiet

    rounds, width = (1, 64) if args.toy else (8, 256)
    with quiet():
        return [seconds_in_trainer(kind, rounds, width, args.folder / "trainer") for kind in ("SFT", "GRPO")]


def known(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Distances from the known solution."""
    return list(tqdm(convergence(*((1, 8) if args.toy else (4, 3000))), "runs", unit=""))


STUDIES: dict[str, Study] = {"fraction": fraction, "cost": cost, "convergence": known, "hacking": hacking}


def main(argv: list[str]) -> None:
    """Run the chosen studies, and write the document of all studies that have results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.below_two", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--studies", nargs="*", choices=STUDIES, default=list(STUDIES), help="without a name: write the document only"
    )
    parser.add_argument("--seeds", type=at_least(1), default=8, help="of the reward-hacking runs, from 10 on")
    parser.add_argument("--toy", action="store_true", help="small models and few steps")
    parser.add_argument("--folder", type=Path, default=Path("runs/below-two"), help="for figures and runs")
    parser.add_argument("--output", type=Path, default=None, help="path of the result, without suffix")
    args = parser.parse_args(argv)
    output = args.output or todays("below-two")
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
    """The value with every number rounded to four digits."""
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main(sys.argv[1:])
