"""Runs the checks of gpu.py in processes of their own, so that one that fails, crashes or hangs stops no other.

A group of checks is a module with ``CHECKS``, functions by name, and a context manager ``surroundings(device)``. A check
takes the device and returns a word about what it found. It raises :class:`Skip` where the device or a package that it needs
is missing, and any other exception if something is wrong. The groups run beside each other. Within a group a new process
goes on after a failure, which may have left the device unusable.
"""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import torch

__all__ = ["GROUPS", "Check", "Outcome", "Skip", "expect", "needed", "outcome_of", "run_checks"]

Check = Callable[[torch.device], str]

GROUPS = {
    "one device": "benchmarks.cost.gpu_step",
    "one rank of a group": "benchmarks.cost.gpu_ranks",
    "trainers, bf16": "benchmarks.cost.gpu_trainers",
}
"""The modules that hold the checks, by the name of their group."""
TIMEOUTS = {"cuda": 90.0, "cpu": 240.0}
"""Seconds after which a check counts as hung: the first one waits for imports; on a CPU, DeepSpeed may have to compile."""


class Skip(Exception):
    """A check cannot run here, for the reason in its message."""


@dataclass(frozen=True)
class Outcome:
    """What came of a check: ``status`` is passed, failed or skipped; ``details`` is the traceback or log of a failure."""

    group: str
    name: str
    status: str
    words: str = ""
    seconds: float = 0.0
    details: str = ""


def expect(condition: object, message: str) -> None:
    """Raise AssertionError unless ``condition`` holds."""
    if not condition:
        raise AssertionError(message)


def needed(package: str) -> Any:
    """The package, imported; :class:`Skip` if it is not installed."""
    if importlib.util.find_spec(package) is None:
        raise Skip(f"{package} is not installed here")
    return importlib.import_module(package)


def run_checks(device: torch.device, tick: Callable[[Outcome], Any]) -> list[Outcome]:
    """The outcomes of all checks; ``tick`` gets each one as it comes, one at a time."""
    lock = Lock()

    def tick_alone(outcome: Outcome) -> None:
        with lock:
            tick(outcome)

    with ThreadPoolExecutor(len(GROUPS)) as pool:
        groups = pool.map(lambda group: run_group(group, GROUPS[group], device, tick_alone), GROUPS)
        return [outcome for outcomes in groups for outcome in outcomes]


def run_group(group: str, module: str, device: torch.device, tick: Callable[[Outcome], Any]) -> list[Outcome]:
    """The outcomes of the checks in ``module``, from one process as long as none fails."""
    found: list[Outcome] = []
    names = list(importlib.import_module(module).CHECKS)
    while len(found) < len(names):
        for outcome in _in_a_process(group, module, names[len(found) :], device):
            tick(outcome)
            found.append(outcome)
    return found


def _in_a_process(group: str, module: str, names: list[str], device: torch.device) -> Iterator[Outcome]:
    """The outcomes of ``names`` in order, up to the first failure at least."""
    context, timeout = multiprocessing.get_context("spawn"), TIMEOUTS[device.type]
    here, there = context.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        process = context.Process(target=_serve, args=(there, group, module, names, device, log.name))
        process.start()
        there.close()
        has_failed = False
        try:
            for name in names:
                try:
                    if not here.poll(timeout):
                        yield Outcome(group, name, "failed", f"no answer within {timeout:.0f} s", details=_end_of(log.name))
                        return
                    outcome = here.recv()
                except EOFError:
                    if has_failed:  # the process has ended itself
                        return
                    outcome = Outcome(group, name, "failed", "its process ended", details=_end_of(log.name))
                has_failed |= outcome.status == "failed"
                yield outcome
            process.join(10)
        finally:
            here.close()
            process.kill()
            process.join()


def _end_of(log: str) -> str:
    return Path(log).read_text(encoding="utf-8", errors="replace")[-2000:]


def _serve(connection: Any, group: str, module: str, names: list[str], device: torch.device, log: str) -> None:
    """In the new process: run ``names`` and send their outcomes, until one fails."""
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    warnings.simplefilter("ignore")
    todo = list(names)
    try:
        held: Any = importlib.import_module(module)
        with held.surroundings(device):
            while todo:
                check = partial(held.CHECKS[todo[0]], device)
                outcome = outcome_of(group, todo.pop(0), check)
                connection.send(outcome)
                if outcome.status == "failed":
                    return
    except Exception as error:  # of the surroundings, without which nothing here can run
        for name in todo:
            connection.send(Outcome(group, name, "failed", _line(error), details=traceback.format_exc()))


def outcome_of(group: str, name: str, check: Callable[[], str]) -> Outcome:
    """What comes of a check that has its device."""
    start, details = time.perf_counter(), ""
    try:
        words, status = check(), "passed"
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # an error of a kernel belongs to the check that launched it
    except Skip as reason:
        words, status = str(reason), "skipped"
    except Exception as error:
        words, status, details = _line(error), "failed", traceback.format_exc()
    return Outcome(group, name, status, words, time.perf_counter() - start, details)


def _line(error: Exception) -> str:
    """The error in one line of a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])}"[:300].replace("|", "/")
