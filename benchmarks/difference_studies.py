"""Ways to a better difference that did not become schemes of difference_accuracy.py, with their figures.

    python benchmarks/difference_studies.py                      # one batch of 256 tokens on SmolLM2-135M
    python benchmarks/difference_studies.py --model random       # seconds

- ``floor``: what the noise of a difference is at a real radius (its distance from the same difference in float32), and
  which cheap probe comes nearest: one bit of some weights, or a step of the same length in a random direction, along which
  there is next to no curvature.
- ``common``: does the same rounding noise in both passes cancel? Everything in float32, but what linear layers and norms
  put out is rounded to bf16: to the nearest, up or down at random, or at random with the same random numbers in both passes.
- ``mean``: g1 as the mean of two gradients, the second with one bit of the first norm flipped: three gradients.
- ``pair``: two gradients at θ ± ε·d, whose mean serves as g1, with a direction known beforehand that has a given cosine
  with g1: what a momentum or the last step's gradient could be.
- ``accumulation``: the batch in micro-batches, with g1 and g2 accumulated in bf16 before they are subtracted, or subtracted
  for each micro-batch and accumulated in float32.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch
from difference_accuracy import Measurement, Row, _rows
from difference_schemes import (
    ARITHMETICS,
    MODELS,
    Batch,
    Passes,
    Tensors,
    jitter_,
    make_batch,
    norm,
    stochastically_rounded,
    subtract,
)
from step_cost import RESULTS, stamp
from torch import Tensor, nn

RADII = (0.005, 0.01)


@contextmanager
def rounded_outputs(model: nn.Module, random: torch.Generator | None) -> Iterator[None]:
    """What linear layers and norms put out, rounded to bf16 (at random if a generator is given); gradients pass through."""

    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        detached = output.detach()
        rounded = detached.bfloat16() if random is None else stochastically_rounded(detached.contiguous(), random)
        return output + (rounded.float() - detached)

    leaves = [m for m in model.modules() if next(m.children(), None) is None and getattr(m, "weight", None) is not None]
    handles = [m.register_forward_hook(hook) for m in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def floor(at: Measurement, wide: dict[float, Tensors]) -> None:
    """The noise at real radii, then each probe of it: all as ‖·‖/‖g1‖, in the column ``rel``."""
    for radius, true in wide.items():
        g2, _ = at.displaced(radius, "master")
        at.add("floor: noise in truth", radius, subtract(subtract(g2, at.g1), true), 2)
    for where, count in (("norm", 8), ("norm", 1), ("linear", 8)):
        at.passes.flip(where, count)
        at.add(f"floor: {count} of the first {where}", math.nan, subtract(at.passes.gradient(at.batch), at.g1), 1)
        at.passes.restore()
    direction = [torch.randn(p.shape, generator=at.random) * p.float().square().mean().sqrt() for p in at.g1]
    direction = [d * (at.norm / norm(direction)) for d in direction]
    for radius in (1e-5, *wide):
        g2, _ = at.displaced(radius, "master", direction)
        at.add("floor: random direction", radius, subtract(g2, at.g1), 1)


def common(at: Measurement) -> None:
    """Rounding of activations alone: nearest, random, and random in common."""
    for name in ("nearest", "random", "random in common"):
        seeds = {"nearest": (None, None), "random": (1, 2), "random in common": (1, 1)}[name]
        first, second = (None if seed is None else torch.Generator().manual_seed(seed) for seed in seeds)
        with rounded_outputs(at.passes.model, first):
            g1 = at.passes.gradient(at.batch)
        for radius in RADII:
            if second is not None:
                second.manual_seed(seeds[1])
            at.passes.displace(at.g1, radius / at.norm, "grid", at.random)
            with rounded_outputs(at.passes.model, second):
                g2 = at.passes.gradient(at.batch)
            at.passes.restore()
            at.add(f"common: {name}", radius, subtract(g2, g1), 2)


def mean(at: Measurement) -> None:
    """A g1 of two rounding draws."""
    at.passes.flip()
    other = at.passes.gradient(at.batch)
    at.passes.restore()
    both = [(a.float() + b.float()) / 2 for a, b in zip(at.g1, other, strict=True)]
    for radius in RADII:
        g2, _ = at.displaced(radius, "master")
        at.add("mean: one g1", radius, subtract(g2, at.g1), 2)
        at.add("mean: two g1", radius, subtract(g2, both), 3)


def pair(at: Measurement, elsewhere: Tensors) -> None:
    """θ ± ε·d along a direction of known cosine with g1, made of g1 and another batch's gradient."""
    unit = norm(elsewhere)
    for cosine in (0.1, 0.3, 0.6, 0.9):
        other = math.sqrt(1 - cosine**2) * at.norm / unit
        direction = [cosine * a.float() + other * b.float() for a, b in zip(at.g1, elsewhere, strict=True)]
        plus, _ = at.displaced(0.01, "master", direction)
        minus, _ = at.displaced(-0.01, "master", direction)
        at.add(f"pair: cosine {cosine} of d and g1", 0.01, subtract(plus, minus, 0.5), 2)


def accumulation(at: Measurement, micro_batches: int = 4) -> None:
    """Subtracted after the accumulation in bf16, or before it in float32."""
    rows = len(at.batch.tokens) // micro_batches
    radius = 0.01
    parts = [
        Batch(at.batch.kind, at.batch.seed, at.batch.tokens[k : k + rows], at.batch.weights[k : k + rows])
        for k in range(0, len(at.batch.tokens), rows)
    ]
    g1 = at.passes.gradient(at.batch, rows=rows)
    own = [at.passes.gradient(part) for part in parts]
    at.passes.displace(g1, radius / at.norm, "master", at.random)
    g2 = at.passes.gradient(at.batch, rows=rows)
    delta = [torch.zeros(p.shape) for p in g1]
    for part, first in zip(parts, own, strict=True):
        for total, a, b in zip(delta, at.passes.gradient(part), first, strict=True):
            total += a.float() - b.float()
    at.passes.restore()
    at.add(f"accumulation: {micro_batches} micro-batches in bf16", radius, subtract(g2, g1), 2)
    at.add(f"accumulation: {micro_batches} micro-batches, differences in fp32", radius, delta, 2)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", choices=list(MODELS))
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--output", type=Path, default=RESULTS / f"{date.today()}-difference-studies.json")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", "The AccumulateGrad node|.*create_graph")
    model = MODELS[args.model]()
    masters = jitter_(model)
    reference = Passes(model, masters, ARITHMETICS["fp32"])
    batch, another = (make_batch(reference.model, "policy", args.tokens, seed) for seed in (0, 1))
    exact = reference.exact(batch, rows=_rows(batch))
    about: Row = {"batch": batch.name, "norm": norm(exact[0])}
    rows: list[Row] = []

    def report(at: Measurement) -> None:
        for row in at.rows:
            figures = "  ".join(
                f"{name} {row[name]:.3f}" for name in ("cosine", "norm_ratio", "rel") if row[name] is not None
            )
            print(f"{row['scheme']:52} ρ = {row['radius']!s:<6} {figures}", flush=True)
        rows.extend(at.rows)
        at.rows = []
        args.output.write_text(json.dumps({"stamp": stamp(), "rows": rows}, indent=0) + "\n", encoding="utf-8")

    wide = {}
    at = Measurement(Passes(model, masters, ARITHMETICS["fp32"]), batch, exact, {**about, "arithmetic": "fp32"})
    common(at)
    report(at)
    for radius in (0.005, 0.01, 0.02):
        wide[radius] = subtract(at.displaced(radius, "master")[0], at.g1)
    at = Measurement(Passes(model, masters, ARITHMETICS["bf16"]), batch, exact, {**about, "arithmetic": "bf16"})
    elsewhere = at.passes.gradient(another)
    floor(at, wide)
    report(at)
    for study in (mean, accumulation):
        study(at)
        report(at)
    pair(at, elsewhere)
    report(at)


if __name__ == "__main__":
    main()
