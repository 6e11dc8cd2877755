"""A problem with a known solution, and the point that ``every=k`` reaches on it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gradreg_optim import GradRegOptimizer

INPUTS, COUNT, BATCHES = 8, 64, 8
PERIODS = (2, 4, 8)
RATIO = 0.5
RATES = {"SGD": 0.1, "AdamW": 3e-3}
"""In units of 1/curvature for SGD."""


class Known:
    """A small tanh network on noisy data in ``BATCHES`` batches, and the minimum of mean_b [L_b + (γ/2)·‖∇L_b‖²].

    With one batch every minimum of L would be a minimum of L + (γ/2)·‖∇L‖² as well, and all variants would find it. The
    noise between batches moves the minimum. ``strength`` makes the penalty ``ratio`` times as long as the gradient of a
    batch at the minimum of L.
    """

    def __init__(self, seed: int, ratio: float) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(BATCHES, COUNT // BATCHES, INPUTS, generator=draw, dtype=torch.float64)
        teacher = torch.randn(INPUTS, generator=draw, dtype=torch.float64) / INPUTS**0.5
        noise = torch.randn(BATCHES, COUNT // BATCHES, generator=draw, dtype=torch.float64)
        self.targets = torch.tanh(self.inputs @ teacher) + 0.5 * noise
        self.strength = 0.0
        self.plain = self._minimum(teacher)
        gradients = [self._gradient(self.plain, b) for b in range(BATCHES)]
        products = [
            torch.func.jvp(lambda w, b=b: self._gradient(w, b), (self.plain,), (g,))[1] for b, g in enumerate(gradients)
        ]
        lengths = [float(torch.stack(x).norm()) for x in (gradients, products)]
        self.strength = ratio * lengths[0] / lengths[1]
        self.answer = self._minimum(self.plain)
        self.steepest = float(torch.linalg.eigvalsh(torch.func.hessian(self.objective)(self.answer))[-1])

    def loss(self, weights: Tensor, batch: int) -> Tensor:
        """The mean squared error of tanh(xw) on a batch."""
        return (torch.tanh(self.inputs[batch] @ weights) - self.targets[batch]).square().mean()

    def _gradient(self, weights: Tensor, batch: int) -> Tensor:
        return torch.func.grad(lambda w: self.loss(w, batch))(weights)

    def objective(self, weights: Tensor) -> Tensor:
        """mean_b [L_b + (γ/2)·‖∇L_b‖²]."""
        total = torch.zeros((), dtype=torch.float64)
        for batch in range(BATCHES):
            total = total + self.loss(weights, batch)
            if self.strength:
                total = total + 0.5 * self.strength * self._gradient(weights, batch).square().sum()
        return total / BATCHES

    def _minimum(self, start: Tensor) -> Tensor:
        """The minimum near ``start``, by LBFGS and then Newton's method, to a gradient of 1e-12."""
        weights = nn.Parameter(start.clone())
        lbfgs = torch.optim.LBFGS(
            [weights], max_iter=2000, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            lbfgs.zero_grad()
            value = self.objective(weights)
            value.backward()
            return value

        lbfgs.step(closure)
        found = weights.detach()
        slope = torch.func.grad(self.objective)
        for _ in range(10):
            if slope(found).norm() < 1e-12:
                break
            found = found - torch.linalg.solve(torch.func.hessian(self.objective)(found), slope(found))
        if not slope(found).norm() < 1e-12 or torch.linalg.eigvalsh(torch.func.hessian(self.objective)(found))[0] <= 0:
            raise RuntimeError("no minimum was found")
        return found

    def distance(self, weights: Tensor) -> float:
        """The distance from the solution, relative to the distance of the minimum of the loss without penalty."""
        return float((weights - self.answer).norm() / (self.plain - self.answer).norm())


def variants(strength: float) -> dict[str, dict[str, Any]]:
    """The settings of each variant."""
    found: dict[str, dict[str, Any]] = {"none": {"strength": 0.0}, "every=1": {"strength": strength}}
    for k in PERIODS:
        found[f"every={k}, plain, γ"] = {"strength": strength, "every": k}
        found[f"every={k}, plain, kγ"] = {"strength": k * strength, "every": k}
    return found


def descend(known: Known, settings: dict[str, Any], *, base: str, steps: int, seed: int) -> Tensor:
    """The weights after each step of a training from the minimum of the loss, with batches in a new order in each epoch."""
    weights = nn.Parameter(known.plain.clone())
    rate = RATES[base] / (known.steepest if base == "SGD" else 1.0)
    inside = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW}[base]([weights], lr=rate, weight_decay=0)
    optimizer = GradRegOptimizer(inside, eps=1e-4, g1_clip=None, g2_clip=None, **settings)
    passed = []
    draw = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(BATCHES, generator=draw) for _ in range(-(-steps // BATCHES))])
    for batch in order[:steps].tolist():

        def closure(batch: int = batch) -> Tensor:
            optimizer.zero_grad()
            value = known.loss(weights, batch)
            value.backward()
            return value

        optimizer.step(closure)
        passed.append(weights.detach().clone())
    return torch.stack(passed)


def convergence(seeds: int, steps: int) -> Iterator[dict[str, Any]]:
    """Distances of every variant on every problem, after ``steps`` steps and after ``steps`` gradients.

    The distance is that of the mean of the weights over the last half of the steps, which averages their noise out.
    """
    for seed in range(seeds):
        known = Known(seed, RATIO)
        for base in RATES:
            for name, settings in variants(known.strength).items():
                passed = descend(known, settings, base=base, steps=steps, seed=seed)
                cost = 1 + (settings["strength"] > 0) / settings.get("every", 1)
                afforded = round(steps / cost)
                distances = (known.distance(passed[end // 2 : end].mean(0)) for end in (steps, afforded))
                yield {
                    "seed": seed,
                    "base": base,
                    "variant": name,
                    **dict(zip(("steps", "gradients"), distances, strict=True)),
                }
