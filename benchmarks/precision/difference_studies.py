"""Further ways to a more accurate difference, which did not become schemes of difference_accuracy.

    python -m benchmarks.precision.difference_studies                      # one batch of 256 tokens on SmolLM2-135M
    python -m benchmarks.precision.difference_studies --model random       # seconds, to see that everything runs

- ``floor``: the noise of a difference at a real radius, which is its distance from the same difference in float32, and cheap
  ways to estimate it: the gradient after moving some weights by one bit, or after a step of the same length in a random
  direction, along which there is almost no curvature.
- ``common``: does rounding noise cancel if it is the same in both passes? Everything is in float32, but the outputs of
  linear layers and norms are rounded to bf16: to nearest, at random, or at random with the same numbers in both passes.
- ``mean``: g1 as the mean of two gradients, for the second of which one bit of the first norm was flipped: three gradients.
- ``pair``: two gradients at θ ± ε·d, whose mean serves as g1. The direction d is known beforehand and has a given cosine
  with g1, like a momentum or the gradient of the last step.
- ``accumulation``: the batch is split into micro-batches. Either g1 and g2 are accumulated in bf16 and then subtracted, or
  they are subtracted for each micro-batch and accumulated in float32.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.language_models import ARITHMETICS, MODELS, SHAPES, Batch, make_batch
from benchmarks.common.results import stamp, todays
from benchmarks.precision.difference_accuracy import Measurement, Row, sequences_at_once
from benchmarks.precision.difference_schemes import (
    Passes,
    Tensors,
    jitter_,
    norm,
    stochastically_rounded_,
    subtract,
)

RADII = (0.005, 0.01)


@contextmanager
def rounded_outputs(model: nn.Module, random: torch.Generator | None) -> Iterator[None]:
    """Round the outputs of linear layers and norms to bf16, at random if a generator is given; gradients pass unchanged."""

    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        detached = output.detach()
        rounded = detached.clone(memory_format=torch.contiguous_format)
        if random is not None:
            stochastically_rounded_(rounded, random)
        return output + (rounded.bfloat16().float() - detached)

    leaves = [m for m in model.modules() if next(m.children(), None) is None and getattr(m, "weight", None) is not None]
    handles = [m.register_forward_hook(hook) for m in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def floor(at: Measurement, wide: dict[float, Tensors]) -> None:
    """The noise at real radii, then each estimate of it: all as ‖·‖/‖g1‖, in the column ``rel``."""
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
    """Rounding of activations alone: to nearest, at random, and at random with the same numbers."""
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
    """g1 as the mean of two gradients with different rounding errors."""
    at.passes.flip()
    other = at.passes.gradient(at.batch)
    at.passes.restore()
    both = [(a.float() + b.float()) / 2 for a, b in zip(at.g1, other, strict=True)]
    for radius in RADII:
        g2, _ = at.displaced(radius, "master")
        at.add("mean: one g1", radius, subtract(g2, at.g1), 2)
        at.add("mean: two g1", radius, subtract(g2, both), 3)


def pair(at: Measurement, elsewhere: Tensors) -> None:
    """θ ± ε·d along a direction of known cosine with g1, made of g1 and the gradient of another batch."""
    unit = norm(elsewhere)
    for cosine in (0.1, 0.3, 0.6, 0.9):
        other = math.sqrt(1 - cosine**2) * at.norm / unit
        direction = [cosine * a.float() + other * b.float() for a, b in zip(at.g1, elsewhere, strict=True)]
        plus, _ = at.displaced(0.01, "master", direction)
        minus, _ = at.displaced(-0.01, "master", direction)
        at.add(f"pair: cosine {cosine} of d and g1", 0.01, subtract(plus, minus, 0.5), 2)


def accumulation(at: Measurement, micro_batches: int = 4) -> None:
    """Subtract after accumulating in bf16, or before accumulating in float32."""
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
    parser.add_argument("--tokens", type=int, default=256, choices=list(SHAPES))
    parser.add_argument("--output", type=Path, default=todays("difference-studies").with_suffix(".json"))
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", "The AccumulateGrad node|.*create_graph")
    model = MODELS[args.model]()
    masters = jitter_(model)
    reference = Passes(model, masters, ARITHMETICS["fp32"])
    batch, another = (make_batch(reference.model, "policy", args.tokens, seed) for seed in (0, 1))
    exact = reference.exact(batch, rows=sequences_at_once(batch))
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
        args.output.parent.mkdir(parents=True, exist_ok=True)
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
