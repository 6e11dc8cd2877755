"""What the penalty of a step tells of the one that a later step would have had."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from below.windows import Window


def estimates(old_gradient: Tensor, old_penalty: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    """What an old penalty makes of H·g at a later gradient g."""
    along = old_penalty @ old_gradient / old_gradient.square().sum()
    across = (old_penalty - along * old_gradient) * (gradient.norm() / old_gradient.norm())
    return {
        "all of it, rescaled": old_penalty * (gradient.norm() / old_gradient.norm()),
        "across alone (LookSAM)": across,
        "along renewed, across kept (reuse)": along * gradient + across,
        "along alone": along * gradient,
    }


def reuse_figures(windows: Sequence[Window], lags: Sequence[int]) -> list[dict[str, Any]]:
    """For each lag and estimate: cosine with the penalty that the step would have had, and relative error; medians.

    An error of 1 is that of leaving the penalty out.
    """
    rows = []
    for lag in lags:
        found: dict[str, list[tuple[float, float]]] = {}
        across: list[float] = []
        for old, new in zip(windows, windows[lag:], strict=False):
            gradient, truth = new.gradients.sum(0), new.penalty
            guesses = estimates(old.gradients.sum(0), old.penalty, gradient)
            for name, guess in guesses.items():
                error = float((guess - truth).norm() / truth.norm())
                found.setdefault(name, []).append((_cosine(guess, truth), error))
            own = truth - (truth @ gradient / gradient.square().sum()) * gradient
            across.append(_cosine(guesses["across alone (LookSAM)"], own))
        for name, pairs in found.items():
            cosine, error = (median(column) for column in zip(*pairs, strict=True))
            rows.append(
                {
                    "lag": lag,
                    "estimate": name,
                    "cosine": cosine,
                    "error": error,
                    "across": median(across),
                    "steps": len(pairs),
                }
            )
    return rows


def together(windows: Sequence[Window], every: int) -> list[dict[str, Any]]:
    """The same over a whole course, of which each ``every``-th penalty is known: of the sums of all penalties.

    "plain, kγ" leaves the steps in between without, and takes ``every`` times the penalty where it is known.
    """
    truth: Tensor = torch.zeros_like(windows[0].penalty)
    sums: dict[str, Tensor] = {}
    for at in range(0, len(windows) - every + 1, every):
        known, *others = windows[at : at + every]
        truth += known.penalty
        added = {"plain, kγ": every * known.penalty}
        for other in others:
            gradient = other.gradients.sum(0)
            truth += other.penalty
            for name, guess in estimates(known.gradients.sum(0), known.penalty, gradient).items():
                added[name] = added.get(name, known.penalty) + guess
        for name, vector in added.items():
            sums[name] = sums.get(name, 0) + vector
    return [
        {"estimate": name, "together": _cosine(vector, truth), "length": float(vector.norm() / truth.norm())}
        for name, vector in sums.items()
    ]


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))
