"""Clock and memory meter of the cost benchmarks.

Times are compared within rounds. In a round each variant takes one step, and its time is divided by that of
the baseline in the same round. Other programs on the machine then disturb all variants alike.
"""

from __future__ import annotations

import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

__all__ = ["keep_freed_memory", "peak_bytes", "quartiles", "timed"]

ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}


def keep_freed_memory() -> None:
    """Restart this program with an allocator that keeps freed memory, as CUDA's does, unless it runs with one
    already.

    By default glibc returns large blocks to the system at once, and every page of a new block costs a page
    fault. How many faults there are depends on the order in which blocks are freed. With 124 M parameters,
    two gradients and a step took 690 thousand faults in a process of their own, and 150 thousand in turn with
    GradRegOptimizer. That is more than the difference to be measured.
    """
    if sys.platform == "linux" and not ALLOCATOR.keys() <= os.environ.keys():
        os.execve(
            sys.executable,
            [sys.executable, *sys.orig_argv[1:]],
            {"KINETO_LOG_LEVEL": "99", **os.environ, **ALLOCATOR},
        )


def timed(step: Callable[[], Any], device: torch.device) -> float:
    """Seconds that ``step`` takes, including the work that it starts on the device."""
    start = time.perf_counter()
    step()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def peak_bytes(steps: Iterable[Callable[[], Any]], device: torch.device) -> list[int]:
    """The peak memory of each of ``steps``, taken one after the other, beyond the memory in use before the
    first one.

    On a CPU a peak is the maximum of the running sum of all allocations and releases.
    """
    alive, peaks = 0, []
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        for step in steps:
            torch.cuda.reset_peak_memory_stats()
            step()
            peaks.append(torch.cuda.max_memory_allocated() - before)
        return peaks
    for step in steps:
        with torch.profiler.profile(profile_memory=True) as profiler:
            step()
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        sums = list(itertools.accumulate(changes, initial=alive))
        peaks.append(max(sums))
        alive = sums[-1]
    return peaks


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high
