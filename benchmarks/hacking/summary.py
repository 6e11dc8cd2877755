"""Figures of each run, their means with bootstrap intervals, and differences paired by seed."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np
from scipy.stats import bootstrap, spearmanr

from benchmarks.hacking.arms import PLAIN, Run, Runs

PROXY_LEVELS = {"at_proxy": 0.7, "at_high_proxy": 0.9}
"""For comparison at equal proxy: the fractions of the plain run's gain in proxy, by seed."""
KL_LEVEL = 5.0
"""For comparison at equal KL: the KL in nats for each answer."""

FIGURES = {
    "final": "final gold",
    "peak": "peak gold",
    "area": "mean gold",
    "at_proxy": f"gold at {PROXY_LEVELS['at_proxy']:.0%} proxy",
    "at_high_proxy": f"gold at {PROXY_LEVELS['at_high_proxy']:.0%} proxy",
    "at_kl": f"gold at KL {KL_LEVEL:g}",
    "final_proxy": "final proxy",
    "final_kl": "final KL",
    "final_accuracy": "proxy accuracy at the end",
}

GAINS = ("final", "area")
"""The figures of which differences between families are shown, paired by seed."""

MEASURES = {
    "penalty_ratio": "‖penalty‖/‖g1‖",
    "curvature": "curvature",
    "cosine": "cosine of g1 and g2",
    "perturbation_fidelity": "fidelity",
    "self_check": "self-check",
}
"""Metrics of the wrapper, averaged over a run."""
LOWEST = "lowest self-check"
MECHANISM = "‖g1‖ and accuracy"


def column(one: Run, name: str) -> list[Any]:
    """A quantity at each measurement of a run."""
    return [point.get(name) for point in one["curve"]]


def area(one: Run) -> float:
    """Mean gold over the steps of a run, by the trapezoidal rule."""
    steps, gold = column(one, "step"), column(one, "gold")
    pieces = [(b - a) * (u + v) / 2 for a, b, u, v in zip(steps, steps[1:], gold, gold[1:], strict=False)]
    return sum(pieces) / (steps[-1] - steps[0])


def gold_at(one: Run, name: str, level: float) -> float | None:
    """Gold where a quantity first reaches a level, interpolated linearly; None if it never does."""
    values, gold = column(one, name), column(one, "gold")
    for i in range(1, len(values)):
        if values[i] >= level > values[i - 1]:
            part = (level - values[i - 1]) / (values[i] - values[i - 1])
            return float(gold[i - 1] + part * (gold[i] - gold[i - 1]))
    return None


def figures(one: Run, plain: Run) -> dict[str, float | None]:
    """The figures of a run; ``plain`` is the unregularized run of its seed."""
    start, end = plain["curve"][0]["proxy"], plain["curve"][-1]["proxy"]
    last = one["curve"][-1]
    return {
        "final": last["gold"],
        "peak": max(column(one, "gold")),
        "area": area(one),
        **{name: gold_at(one, "proxy", start + part * (end - start)) for name, part in PROXY_LEVELS.items()},
        "at_kl": gold_at(one, "kl", KL_LEVEL),
        "final_proxy": last["proxy"],
        "final_kl": last["kl"],
        "final_accuracy": last["proxy_accuracy"],
    }


def measures(one: Run) -> dict[str, float | None]:
    """The wrapper's metrics over a run, and its :func:`mechanism`; None without values."""
    kept = {name: [value for value in column(one, name) if value is not None] for name in MEASURES}
    means = {title: fmean(kept[name]) if kept[name] else None for name, title in MEASURES.items()}
    return {**means, LOWEST: min(kept["self_check"], default=None), MECHANISM: mechanism(one)}


def interval(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean and 95% bootstrap interval over the seeds that have a value; ``count`` is their number."""
    numbers = [float(value) for value in values if value is not None]
    if not numbers:
        return {"mean": None, "low": None, "high": None, "count": 0}
    if len(set(numbers)) < 2:
        return {"mean": numbers[0], "low": numbers[0], "high": numbers[0], "count": len(numbers)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # for two or three seeds, BCa warns that its interval is degenerate
        drawn = bootstrap(
            (numbers,), np.mean, n_resamples=9999, method="percentile", rng=np.random.default_rng(0)
        )
    low, high = drawn.confidence_interval
    return {"mean": fmean(numbers), "low": float(low), "high": float(high), "count": len(numbers)}


def mechanism(one: Run) -> float | None:
    """Spearman's correlation of ‖g1‖ with the proxy's accuracy over a run; the paper expects it below 0."""
    points = [
        point
        for point in one["curve"]
        if point.get("g1_norm") is not None and point["proxy_accuracy"] is not None
    ]
    if (
        len({point["g1_norm"] for point in points}) < 3
        or len({point["proxy_accuracy"] for point in points}) < 2
    ):
        return None
    return float(
        spearmanr(
            [point["g1_norm"] for point in points], [point["proxy_accuracy"] for point in points]
        ).statistic
    )


def summarise(runs: Runs) -> dict[str, dict[str, Any]]:
    """For each family: figures with intervals, gains over each other family, and the wrapper's metrics."""
    plain = {one["seed"]: one for one in runs[PLAIN]}
    of = {
        family: {one["seed"]: figures(one, plain[one["seed"]]) for one in group}
        for family, group in runs.items()
    }
    summary: dict[str, dict[str, Any]] = {}
    for family, group in runs.items():
        own, measured = of[family], [measures(one) for one in group]
        summary[family] = {
            "setting": group[0]["arm"]["name"],
            "seeds": sorted(own),
            "figures": {name: interval([row[name] for row in own.values()]) for name in FIGURES},
            "gain": {
                f"{name} over {other}": interval(
                    [
                        row[name] - theirs[seed][name]
                        for seed, row in own.items()
                        if seed in theirs and None not in (row[name], theirs[seed][name])
                    ]
                )
                for other, theirs in of.items()
                if other != family
                for name in GAINS
            },
            "measures": {name: interval([row[name] for row in measured]) for name in measured[0]},
            "seconds_per_step": fmean(one["seconds_per_step"] for one in group),
        }
    return summary
