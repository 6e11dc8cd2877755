"""How well does the difference on a part of a step's micro-batches estimate that on all of them?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.below_two.windows import PUBLISHED, Window, recorder, step, vector_of
from benchmarks.common.language_models import MODELS, make_batch

FRACTIONS = (1 / 16, 1 / 8, 1 / 4, 1 / 2)


def part_figures(window: Window, strength: float) -> dict[str, Any]:
    """Cosines with the values of the whole window, and ratios of lengths, for each part of each fraction.

    All vectors are combinations of the micro-batches' gradients and changes, so their inner products are sufficient.
    """
    rows = torch.cat([window.gradients, window.changes]).double()
    products, count = rows @ rows.T, len(window.gradients)
    ones, nothing = torch.ones(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)

    def inner(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
        return float(torch.cat(a) @ products @ torch.cat(b))

    def length(a: tuple[Tensor, Tensor]) -> float:
        return math.sqrt(inner(a, a))

    def compare(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[float, float]:
        return inner(a, b) / (length(a) * length(b)), length(a) / length(b)

    gradient, change = (ones, nothing), (nothing, ones)
    weights = {"strength": strength / window.eps, "ratio 1": length(gradient) / length(change)}

    def noise(of_gradients: float, of_changes: float) -> float:
        """The variance of a combination of gradient and change between micro-batches."""
        both = torch.cat([of_gradients * torch.eye(count), of_changes * torch.eye(count)], 1).double()
        inside = both @ products @ both.T
        return float(inside.trace() / count - inside.sum() / count**2)

    figures: dict[str, Any] = {
        # Times 1/f − 1, this is the noise that a fraction f adds, relative to the noise of the batch.
        "noise": {name: noise(0, weight) / noise(1, weight) for name, weight in weights.items()},
        "penalty_ratio": weights["strength"] / weights["ratio 1"],
        "norm": length(gradient),
        "agreement": {"gradient": _agreement(products[:count, :count]), "change": _agreement(products[count:, count:])},
    }
    parts = []
    for fraction in FRACTIONS:
        size = round(fraction * count)
        for start in range(count) if size else ():
            chosen = nothing.clone()
            chosen[[(start + offset) % count for offset in range(size)]] = count / size
            row: dict[str, float] = {"fraction": fraction}
            pairs = {"change": ((nothing, chosen), change), "gradient": ((chosen, nothing), gradient)}
            for name, weight in weights.items():
                whole = (ones, weight * ones)
                pairs[f"g, {name}"] = ((ones, weight * chosen), whole)
                pairs[f"smaller batch, {name}"] = ((chosen, weight * chosen), whole)
            for name, pair in pairs.items():
                row[name], row[f"{name}, length"] = compare(*pair)
            parts.append(row)
    return {**figures, "parts": {name: [row[name] for row in parts] for name in parts[0]}}


def _agreement(products: Tensor) -> float:
    """The mean cosine of two different rows, from their inner products."""
    cosines = products / products.diag().sqrt().outer(products.diag().sqrt())
    count = len(cosines)
    return float((cosines.sum() - cosines.trace()) / (count * (count - 1)))


def parts_of_real_batches(model_name: str, batches: Iterable[tuple[str, int, int]]) -> Iterator[dict[str, Any]]:
    """The figures of every batch; each of its sequences is a micro-batch."""
    model = MODELS[model_name]()
    vector = vector_of(model_name)
    for kind, size, seed in batches:
        batch = make_batch(model, kind, size, seed)
        optimizer = recorder(model, torch.optim.SGD(model.parameters(), lr=0.0), vector)
        yield {
            "problem": f"{model_name}, {kind}",
            "batch": batch.name,
            **part_figures(step(optimizer, model, batch), PUBLISHED),
        }
