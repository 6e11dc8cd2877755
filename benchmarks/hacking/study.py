"""Runs on several processes, tuning, and the choice of settings. Finished runs are not repeated."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.hacking.arms import PLAIN, STOPPED, Arm
from benchmarks.hacking.run import run
from benchmarks.hacking.world import Scale, prepare

Run = dict[str, Any]


class Study:
    """Runs of arms on seeds, kept in a folder that belongs to one scale."""

    def __init__(self, folder: Path, scale: Scale, jobs: int) -> None:
        self.folder, self.scale, self.jobs = folder, scale, jobs
        folder.mkdir(parents=True, exist_ok=True)
        record, settings = folder / "scale.json", asdict(scale)
        # A record from before a setting was added has its default.
        if record.exists() and {**asdict(Scale()), **json.loads(record.read_text())} != settings:
            raise ValueError(
                f"{folder} holds runs of another scale, {record.read_text().strip()}. Give another --folder, or delete it"
            )
        record.write_text(json.dumps(settings) + "\n")

    def runs(self, arms: Iterable[Arm], seeds: Sequence[int], title: str) -> list[Run]:
        """The results of all arms on all seeds, each name once. The progress bar counts steps, also of finished runs."""
        unique = {arm.name: arm for arm in arms}.values()
        self.work(prepare_seed, [(self.scale, self.folder, seed) for seed in seeds], f"{title}: worlds", len(seeds))
        tasks = [(self.scale, self.folder, arm, seed) for seed in seeds for arm in unique]
        return self.work(run_arm, tasks, f"{title}: steps", len(tasks) * self.scale.steps)

    def work(self, function: Callable[..., Any], tasks: list[Any], title: str, total: int) -> list[Any]:
        """The results of ``function`` for each task, in order. It also gets a function that advances a bar of ``total``."""
        with tqdm(total=total, desc=title, smoothing=0.02) as bar:
            if self.jobs == 1:
                with quiet():
                    return [function(*task, bar.update) for task in tasks]
            context = get_context("spawn")
            ticks = context.SimpleQueue()
            with context.Pool(self.jobs, initializer=start_worker, initargs=(ticks,)) as pool:
                results = pool.starmap_async(function, tasks, chunksize=1)
                while not results.ready() or not ticks.empty():
                    if ticks.empty():
                        results.wait(0.2)
                    else:
                        bar.update(ticks.get())
                pool.close()
                pool.join()  # leaving the block would kill workers that are still running
                return list(results.get())


_ticks: Any = None


def start_worker(ticks: Any) -> None:
    """Set up a worker process: one thread, and the queue for progress."""
    global _ticks
    _ticks = ticks
    torch.set_num_threads(1)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the logs, bars and warnings of trainers, which would break up the progress bar of the study."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    with warnings.catch_warnings(), Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        # trl 1.16 uses a name that transformers 5.23 has changed.
        warnings.filterwarnings("ignore", r".*Use `(is_)?activation_checkpointing", FutureWarning)
        # The self-check is in the results.
        warnings.filterwarnings("ignore", "Gradient regularization: the self-check", UserWarning)
        yield


def prepare_seed(scale: Scale, folder: Path, seed: int, update: Callable[[int], Any] | None = None) -> None:
    """Build the seed's world, unless it exists."""
    with quiet():
        prepare(scale, seed, folder / f"world-{seed}")
    (update or _ticks.put)(1)


def run_arm(scale: Scale, folder: Path, arm: Arm, seed: int, update: Callable[[int], Any] | None = None) -> Run:
    """Run an arm on a seed, or read its result."""
    with quiet(), reporting(scale.steps, update) as tick:
        return run(arm, prepare(scale, seed, folder / f"world-{seed}"), scale, seed, folder, tick)


@contextlib.contextmanager
def reporting(steps: int, update: Callable[[int], Any] | None) -> Iterator[Callable[[], None]]:
    """Yield a function to call after each step. At the end, report the steps that it was not called for."""
    advance, done = update or _ticks.put, 0

    def tick() -> None:
        nonlocal done
        done += 1
        advance(1)

    yield tick
    advance(steps - done)


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
    average = {points[0]["step"]: fmean(point["gold"] for point in points) for points in zip(*curves, strict=True)}
    return max(average, key=average.__getitem__)


def stopped(plain: Run, step: int) -> Run:
    """The plain run with early stopping: nothing changes after that step."""
    at_stop = next(point for point in plain["curve"] if point["step"] == step)
    curve = [point if point["step"] <= step else {**at_stop, "step": point["step"]} for point in plain["curve"]]
    return {**plain, "arm": {**plain["arm"], "name": f"stopped-{step}"}, "curve": curve}


def by_family(chosen: Mapping[str, Arm], reported: Sequence[Run], stop: int | None = None) -> dict[str, list[Run]]:
    """The reported runs of each family, and those of early stopping if its step is given."""
    runs: dict[str, list[Run]] = {}
    for family, arm in chosen.items():
        runs[family] = [one for one in reported if one["arm"]["name"] == arm.name]
        if family == PLAIN and stop is not None:
            runs[STOPPED] = [stopped(one, stop) for one in runs[PLAIN]]
    return runs
