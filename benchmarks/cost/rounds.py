"""Figures of variants that take one step each in turn: seconds, gradients, and peaks of memory."""

from __future__ import annotations

import statistics
from typing import Any

from tqdm import tqdm

from benchmarks.cost.measuring import peak_bytes, quartiles, timed
from benchmarks.cost.peers import PEERS
from benchmarks.cost.subject import Step, Subject
from benchmarks.cost.variants import GRADIENTS, PERIODS

__all__ = ["measured", "over_kinds"]

MIN_ROUNDS, MAX_ROUNDS = 4, 16
"""Multiples of the longest period, so that every variant takes whole periods."""

Peaks = dict[str, dict[str, int]]
"""By variant: bytes beyond the base step, of the first step and of the usual one."""
Series = dict[str, list[float]]
"""By variant: a figure of each round."""


def measured(subject: Subject, steps: dict[str, Step], *, seconds: float, title: str) -> dict[str, Any]:
    """The figures of all variants, from as many rounds as fit into ``seconds``."""
    optimizer = subject.adamw(subject.parameters)
    subject.closure()
    optimizer.step()  # makes the state that all variants share
    peaks = measure_peaks(subject, steps)  # warms all of them up as well
    gradient, step = (timed(part, subject.device) for part in (subject.closure, optimizer.step))
    one_round = sum(GRADIENTS.get(name, 2.0) for name in steps) * gradient + len(steps) * step
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds / one_round) // MIN_ROUNDS * MIN_ROUNDS))
    tqdm.write(f"{title}: {rounds} rounds, about {rounds * one_round:.0f} s")
    times, gradients = in_turn(steps, subject, rounds, title)
    weights = sum(parameter.nbytes for parameter in subject.parameters)
    rows = summarise(times, gradients, peaks, weights)
    return {"rounds": rounds, "rows": rows, "seconds": times, "gradients": gradients, "peaks": peaks}


def measure_peaks(subject: Subject, steps: dict[str, Step]) -> Peaks:
    """Peak bytes of a step of each variant beyond those of the base step, including what it keeps between
    steps.

    ``usual`` is the maximum over a period. ``first`` is the first step, which may check the precision. Both
    are counted with one sequence a micro-batch, and with two micro-batches where the cell has several, if the
    subject can be limited.
    """
    subject.limit(2, sequences=1)
    peaks = {}
    for name, step in steps.items():
        if name in PEERS and PEERS[name].has_own_tensors:
            step()
        subject.model.zero_grad()
        first, *others = peak_bytes([step] * (1 + PERIODS.get(name, 1)), subject.device)
        peaks[name] = {"first": first, "usual": max(others)}
    subject.limit()
    return {name: {kind: peaks[name][kind] - peaks["base"][kind] for kind in peaks[name]} for name in steps}


def in_turn(steps: dict[str, Step], subject: Subject, rounds: int, title: str) -> tuple[Series, Series]:
    """Seconds and gradients of each variant's steps, one step of each in every round."""
    times: Series = {name: [] for name in steps}
    gradients: Series = {name: [] for name in steps}
    for _ in tqdm(range(rounds), desc=title, leave=False):
        for name, step in steps.items():
            before = subject.gradients
            times[name].append(timed(step, subject.device))
            gradients[name].append(round(subject.gradients - before, 6))
    return times, gradients


def summarise(times: Series, gradients: Series, peaks: Peaks, weights: int) -> dict[str, dict[str, float]]:
    """The figures of the tables; ``weights`` are the bytes of one copy of the weights."""
    rows = {}
    for name, seconds in times.items():
        ratios = [own / floor for own, floor in zip(seconds, times["floor"], strict=True)]
        rows[name] = {"gradients": statistics.mean(gradients[name])}
        for figure, values in (("seconds", seconds), ("to_floor", ratios)):
            names = (f"{figure}_low", figure, f"{figure}_high")
            rows[name] |= dict(zip(names, over_kinds(values, gradients[name]), strict=True))
        rows[name] |= {
            "copies_beyond_base": peaks[name]["usual"] / weights,
            "copies_beyond_base_first": peaks[name]["first"] / weights,
        }
    return rows


def over_kinds(values: list[float], kinds: list[float]) -> tuple[float, ...]:
    """Quartiles of a quantity that depends on the kind of step: those of each kind, weighted by its
    frequency.

    The kind of a step is its number of gradients.

    >>> over_kinds([2.0, 1.0, 1.0, 1.5], [2, 1, 1, 1])
    (1.25, 1.25, 1.4375)
    """
    parts = []
    for kind in sorted(set(kinds)):
        own = [value for value, other in zip(values, kinds, strict=True) if other == kind]
        parts.append([quartile * len(own) / len(values) for quartile in quartiles(own)])
    return tuple(sum(column) for column in zip(*parts, strict=True))
