"""Runs on several processes, tuning, and the choice of settings. Finished runs are not repeated."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.hacking.arms import PLAIN, STOPPED, Arm, Run
from benchmarks.hacking.run import run
from benchmarks.hacking.world import Scale, prepare


class Study:
    """Runs of arms on seeds, kept in a folder that belongs to one scale."""

    def __init__(self, folder: Path, scale: Scale, jobs: int) -> None:
        self.folder, self.scale, self.jobs = folder, scale, jobs
        folder.mkdir(parents=True, exist_ok=True)
        record, settings = folder / "scale.json", asdict(scale)
        # A record from before a setting was added has its default.
        if record.exists() and {**asdict(Scale()), **json.loads(record.read_text())} != settings:
            other = record.read_text().strip()
            raise ValueError(
                f"{folder} holds runs of another scale, {other}. Give another --folder, or delete it"
            )
        record.write_text(json.dumps(settings) + "\n")

    def runs(self, arms: Iterable[Arm], seeds: Sequence[int], title: str) -> list[Run]:
        """The results of all arms on all seeds, each name once."""
        unique = {arm.name: arm for arm in arms}.values()
        self.work(prepare_seed, [(self.scale, self.folder, seed) for seed in seeds], f"{title}: worlds")
        tasks = [(self.scale, self.folder, arm, seed) for seed in seeds for arm in unique]
        return self.work(run_arm, tasks, f"{title}: runs")

    def work(self, function: Callable[..., Any], tasks: list[Any], title: str) -> list[Any]:
        """The results of ``function`` for each task, in order."""
        bar = partial(tqdm, total=len(tasks), desc=title)
        if self.jobs == 1:
            return [function(*task) for task in bar(tasks)]
        settings = {
            "mp_context": get_context("spawn"),
            "initializer": torch.set_num_threads,
            "initargs": (1,),
        }
        with ProcessPoolExecutor(self.jobs, **settings) as pool:
            return list(bar(pool.map(function, *zip(*tasks, strict=True))))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the logs, bars and warnings of trainers, which would break up the progress bar of the study."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    with (
        warnings.catch_warnings(),
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        # trl 1.16 uses a name that transformers 5.23 has changed.
        warnings.filterwarnings("ignore", r".*Use `(is_)?activation_checkpointing", FutureWarning)
        # The self-check is in the results.
        warnings.filterwarnings("ignore", "Gradient regularization: the self-check", UserWarning)
        yield


def prepare_seed(scale: Scale, folder: Path, seed: int) -> None:
    """Build the seed's world, unless it exists."""
    with quiet():
        prepare(scale, seed, folder / f"world-{seed}")


def run_arm(scale: Scale, folder: Path, arm: Arm, seed: int) -> Run:
    """Run an arm on a seed, or read its result."""
    with quiet():
        return run(arm, prepare(scale, seed, folder / f"world-{seed}"), scale, seed, folder)


def final(one: Run) -> float:
    """Gold at the end of a run."""
    return float(one["curve"][-1]["gold"])


def tuned(grids: Mapping[str, Sequence[Arm]], tuning: Sequence[Run]) -> dict[str, Arm]:
    """The setting of each grid with the highest final gold, averaged over the tuning seeds."""

    def score(arm: Arm) -> float:
        return fmean(final(one) for one in tuning if one["arm"]["name"] == arm.name)

    return {family: max(grid, key=score) for family, grid in grids.items()}


def stopping_step(tuning: Sequence[Run]) -> int:
    """The step at which the gold of the plain runs is highest, averaged over the tuning seeds."""
    curves = [one["curve"] for one in tuning if one["arm"]["name"] == PLAIN]
    average = {
        points[0]["step"]: fmean(point["gold"] for point in points) for points in zip(*curves, strict=True)
    }
    return max(average, key=average.__getitem__)


def stopped(plain: Run, step: int) -> Run:
    """The plain run with early stopping: nothing changes after that step."""
    at_stop = next(point for point in plain["curve"] if point["step"] == step)
    curve = [
        point if point["step"] <= step else {**at_stop, "step": point["step"]} for point in plain["curve"]
    ]
    return {**plain, "arm": {**plain["arm"], "name": f"stopped-{step}"}, "curve": curve}


def by_family(
    chosen: Mapping[str, Arm], reported: Sequence[Run], stop: int | None = None
) -> dict[str, list[Run]]:
    """The reported runs of each family, and those of early stopping if its step is given."""
    runs: dict[str, list[Run]] = {}
    for family, arm in chosen.items():
        runs[family] = [one for one in reported if one["arm"]["name"] == arm.name]
        if family == PLAIN and stop is not None:
            runs[STOPPED] = [stopped(one, stop) for one in runs[PLAIN]]
    return runs
