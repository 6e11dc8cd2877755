"""Worlds and runs on several processes, tuning, and the choice it leads to. What is finished is not repeated."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tqdm import tqdm

from hacking.arms import FAMILIES, PLAIN, STOPPED, Arm
from hacking.run import run
from hacking.world import Scale, prepare

Run = dict[str, Any]
Job = tuple[Arm, int]


class Study:
    """Runs of arms on seeds, kept in a folder that belongs to one scale."""

    def __init__(self, folder: Path, scale: Scale, jobs: int) -> None:
        self.folder, self.scale, self.jobs = folder, scale, jobs
        folder.mkdir(parents=True, exist_ok=True)
        record, settings = folder / "scale.json", asdict(scale)
        if record.exists() and json.loads(record.read_text()) != settings:
            raise ValueError(
                f"{folder} holds runs of another scale, {record.read_text().strip()}. Give another --folder, or delete it"
            )
        record.write_text(json.dumps(settings) + "\n")

    def runs(self, todo: Sequence[Job], title: str) -> list[Run]:
        """The results, in order; a bar counts steps, those of finished runs included."""
        seeds = sorted({seed for _, seed in todo})
        self._work(prepare_seed, [(self.scale, self.folder, seed) for seed in seeds], f"{title}: worlds", len(seeds))
        tasks = [(self.scale, self.folder, arm, seed) for arm, seed in todo]
        return self._work(run_arm, tasks, f"{title}: steps", len(todo) * self.scale.steps)

    def _work(self, function: Callable[..., Any], tasks: list[Any], title: str, total: int) -> list[Any]:
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
                pool.join()  # leaving the block would end the workers wherever they are
                return list(results.get())


_ticks: Any = None


def start_worker(ticks: Any) -> None:
    """In each process: one core, no chatter, and where to report progress."""
    global _ticks
    _ticks = ticks
    torch.set_num_threads(1)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the logs, bars and warnings of trainers, which would tear the bar of the study."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    with warnings.catch_warnings(), Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        # trl 1.16 uses a name that transformers 5.23 has changed; the check of the difference is in the results.
        warnings.filterwarnings("ignore", r".*Use `(is_)?activation_checkpointing", FutureWarning)
        yield


def prepare_seed(scale: Scale, folder: Path, seed: int, update: Callable[[int], Any] | None = None) -> None:
    """Build the seed's world if need be."""
    with quiet():
        prepare(scale, seed, folder / f"world-{seed}")
    (update or _ticks.put)(1)


def run_arm(scale: Scale, folder: Path, arm: Arm, seed: int, update: Callable[[int], Any] | None = None) -> Run:
    """Run an arm on a seed, or read what came out of it."""
    advance, done = update or _ticks.put, 0

    def tick() -> None:
        nonlocal done
        done += 1
        advance(1)

    with quiet():
        result = run(arm, prepare(scale, seed, folder / f"world-{seed}"), scale, seed, folder, tick)
    advance(scale.steps - done)
    return result


def candidates(families: Sequence[str]) -> list[Arm]:
    """Every setting of the families."""
    return [arm for family in families for arm in FAMILIES[family]]


def final(one: Run) -> float:
    """Gold at the end of a run."""
    return float(one["curve"][-1]["gold"])


def tuned(families: Sequence[str], tuning: Sequence[Run]) -> dict[str, Arm]:
    """The setting of each family whose gold at the end is highest, on average over the tuning seeds."""

    def score(arm: Arm) -> float:
        return fmean(final(one) for one in tuning if one["arm"]["name"] == arm.name)

    return {family: max(FAMILIES[family], key=score) for family in families}


def stopping_step(tuning: Sequence[Run]) -> int:
    """The step at which gold of the plain runs is highest, on average over the tuning seeds."""
    curves = [one["curve"] for one in tuning if one["arm"]["name"] == PLAIN]
    average = {points[0]["step"]: fmean(point["gold"] for point in points) for points in zip(*curves, strict=True)}
    return max(average, key=average.__getitem__)


def stopped(plain: Run, step: int) -> Run:
    """The plain run as early stopping leaves it: from that step on nothing changes."""
    at_stop = next(point for point in plain["curve"] if point["step"] == step)
    curve = [point if point["step"] <= step else {**at_stop, "step": point["step"]} for point in plain["curve"]]
    return {**plain, "arm": {**plain["arm"], "name": f"stopped-{step}"}, "curve": curve}


def by_family(chosen: dict[str, Arm], reported: Sequence[Run], stop: int | None) -> dict[str, list[Run]]:
    """The reported runs of each family, early stopping after the plain ones if its step is known."""
    runs: dict[str, list[Run]] = {}
    for family, arm in chosen.items():
        runs[family] = [one for one in reported if one["arm"]["name"] == arm.name]
        if family == PLAIN and stop is not None:
            runs[STOPPED] = [stopped(one, stop) for one in runs[PLAIN]]
    return runs
