"""A problem with a known answer, and where ``every=k`` leads on it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gradreg_optim import GradRegOptimizer


class AlongOnly(GradRegOptimizer):
    """``between="reuse"`` without its memory: the part of the penalty along the gradient alone."""

    def _keep(self, first: Any, combined: Any) -> None:
        super()._keep(first, combined)
        self._fresh.clear()


INPUTS, COUNT, BATCHES = 8, 64, 8
PERIODS = (2, 4, 8)
RATIO = 0.5
RATES = {"SGD": 0.1, "AdamW": 3e-3}
"""In units of 1/curvature for SGD."""


class Known:
    """A small tanh network on noisy data in ``BATCHES`` batches, and the minimum of mean_b [L_b + (γ/2)·‖∇L_b‖²].

    On one full batch every minimum of L is one of L + (γ/2)·‖∇L‖² as well, and there is nothing to tell the variants by. The
    noise between batches is what moves the minimum. ``strength`` makes the penalty ``ratio`` times as long as the gradient
    of a batch at the minimum of L.
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
        """Mean squared error of tanh(xw) on a batch."""
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
        """By LBFGS and then Newton's method, down to a gradient of 1e-12."""
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
        """How far from the answer, in units of how far the minimum of the bare loss is from it."""
        return float((weights - self.answer).norm() / (self.plain - self.answer).norm())


def variants(strength: float) -> dict[str, tuple[type[GradRegOptimizer], dict[str, Any]]]:
    """Settings by name."""
    found: dict[str, tuple[type[GradRegOptimizer], dict[str, Any]]] = {
        "none": (GradRegOptimizer, {"strength": 0.0}),
        "every=1": (GradRegOptimizer, {"strength": strength}),
    }
    for k in PERIODS:
        found[f"every={k}, plain, γ"] = (GradRegOptimizer, {"strength": strength, "every": k})
        found[f"every={k}, plain, kγ"] = (GradRegOptimizer, {"strength": k * strength, "every": k})
        found[f"every={k}, reuse, γ"] = (GradRegOptimizer, {"strength": strength, "every": k, "between": "reuse"})
        found[f"every={k}, along alone, γ"] = (AlongOnly, {"strength": strength, "every": k, "between": "reuse"})
    return found


def descend(
    known: Known, kind: type[GradRegOptimizer], settings: dict[str, Any], *, base: str, steps: int, seed: int
) -> Tensor:
    """Train from the minimum of the bare loss, on the batches in a new order in each epoch; the weights after each step."""
    weights = nn.Parameter(known.plain.clone())
    rate = RATES[base] / (known.steepest if base == "SGD" else 1.0)
    inside = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW}[base]([weights], lr=rate, weight_decay=0)
    optimizer = kind(inside, eps=1e-4, g1_clip=None, g2_clip=None, **settings)
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
    """Every variant on every problem: the distance after ``steps`` steps, and after as many gradients.

    Of the weights it is the mean over the last half of the steps that counts, which takes their noise out.
    """
    for seed in range(seeds):
        known = Known(seed, RATIO)
        for base in RATES:
            for name, (kind, settings) in variants(known.strength).items():
                passed = descend(known, kind, settings, base=base, steps=steps, seed=seed)
                cost = 1 + (settings["strength"] > 0) / settings.get("every", 1)
                afforded = round(steps / cost)
                distances = (known.distance(passed[end // 2 : end].mean(0)) for end in (steps, afforded))
                yield {
                    "seed": seed,
                    "base": base,
                    "variant": name,
                    **dict(zip(("steps", "gradients"), distances, strict=True)),
                }
