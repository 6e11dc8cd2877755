"""How accurate is the finite difference of two gradients, by scheme, radius and arithmetic?

    python -m benchmarks.precision.difference_accuracy            # SmolLM2-135M, all batches: an hour on two CPU cores
    python -m benchmarks.precision.difference_accuracy --quick    # one batch of 256 tokens: minutes
    python -m benchmarks.precision.difference_accuracy --model random --quick    # seconds, to see that everything runs

Every estimate (g2 − g1)/ε is compared with H·g1 by double backward in float32: cosine, ratio of the norms, projection
⟨estimate, H·g1⟩/‖H·g1‖², and the cosine of the combined gradient g1 + (γ/ε)(g2 − g1) with the exact one at γ/ε of 1, 10
and 100. The schemes (see :mod:`benchmarks.precision.difference_schemes`):

- ``published``   bf16 weights, moved by ε = 1e-3 and rounded to nearest, for gradients scaled to several norms
- ``grid``        the same by a radius ρ = ε·‖g1‖
- ``stochastic``  the same, rounded up or down at random
- ``sparse``      the same along the largest 0.1% of the elements of g1
- ``master``      from float32 masters, rounded to bf16
- ``central``     (g(θ + εd) − g(θ − εd))/2 from masters: three gradients
- ``exact``       double backward in bf16
- ``auto``        ``master`` at the radius where ‖g2 − g1‖/‖g1‖ is a multiple of the measured noise floor

Besides plain bf16, the passes run in other arithmetics. The most important one is fp16 over bf16 weights: under
``torch.autocast(float16)`` with a loss scale and a float32 residual stream, as fast as bf16 on hardware with fp16.

The scale of a gradient only changes which radius a given ε means, because multiplying the loss by a power of two multiplies
every rounding error by it. A result at a given radius therefore holds at every scale.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.arguments import existing
from benchmarks.common.language_models import ARITHMETICS, MODELS, Batch, make_batch
from benchmarks.common.results import stamp, todays
from benchmarks.precision.accuracy_tables import figure, markdown
from benchmarks.precision.difference_schemes import (
    NORMS,
    RADII,
    Figures,
    Passes,
    Tensors,
    gram,
    halvings,
    jitter_,
    norm,
    subtract,
)

Row = dict[str, Any]

TOP, COUNT = 0.04, 6
"""The largest radius, and how many there are, each half of the one above."""
PUBLISHED_EPS = 1e-3
BATCHES = [  # kind, trained tokens, seed; the most important ones first, in case a run is cut short
    ("policy", 1024, 0),
    ("policy", 256, 0),
    ("sharp", 256, 0),
    ("policy", 80, 0),
    ("sharp", 1024, 0),
    ("text", 1024, 0),
    ("policy", 256, 1),
    ("policy", 1024, 1),
    ("sharp", 256, 1),
    ("policy", 80, 1),
    ("text", 256, 0),
    ("policy", 256, 2),
]
OTHERS = [name for name in ARITHMETICS if name != "bf16"]
COMPARED = ("policy-256-0", "sharp-256-0")
"""The batches on which all arithmetics run; bf16 runs on all batches."""


class Measurement:
    """One batch in one arithmetic: g1, its noise floor, and the rows of the estimates."""

    def __init__(self, passes: Passes, batch: Batch, exact: tuple[Tensors, Tensors], about: Row) -> None:
        self.passes, self.batch, self.exact, self.about = passes, batch, exact, about
        self.random = torch.Generator().manual_seed(0)
        self.rows: list[Row] = []
        start = time.process_time()
        self.g1 = passes.gradient(batch)
        self.seconds = time.process_time() - start
        self.norm = norm(self.g1)
        passes.flip()
        self.floor = norm(subtract(passes.gradient(batch), self.g1)) / self.norm
        passes.restore()

    def displaced(self, radius: float, rounding: str, direction: Tensors | None = None) -> tuple[Tensors, float]:
        """The gradient at θ + ε·d, with ε·‖g1‖ = radius, and the fidelity of the step."""
        fidelity = self.passes.displace(direction or self.g1, radius / self.norm, rounding, self.random)
        gradient = self.passes.gradient(self.batch)
        self.passes.restore()
        return gradient, fidelity

    def add(self, scheme: str, radius: float, delta: Tensors, cost: float, **extra: float) -> None:
        """Compare δ with ε·H·g1, and add the row."""
        floor = self.floor / 2 if scheme == "central" else self.floor  # δ is half a difference there
        figures = Figures(gram(*self.exact, self.g1, delta), radius / self.norm, floor, extra)
        self.rows.append(
            {
                **self.about,
                "scheme": scheme,
                "radius": None if math.isnan(radius) else radius,
                "gradients": cost,
                **figures.row(),
            }
        )

    def sweep(self, radii: Iterable[float], scheme: str = "master", *, central: bool = False) -> None:
        """Forward differences at each radius, and central ones from the same passes; compare each with the one before."""
        before: dict[str, Tensors] = {}
        for radius in radii:
            plus, fidelity = self.displaced(radius, scheme)
            deltas, mirror = {scheme: subtract(plus, self.g1)}, math.nan
            if central:
                minus, _ = self.displaced(-radius, scheme)
                mirror = _cosine(deltas[scheme], subtract(self.g1, minus))
                deltas["central"] = subtract(plus, minus, 0.5)
            for name, delta in deltas.items():
                check = _cosine(delta, before[name]) if name in before else math.nan
                cost = 3 if name == "central" else 2
                self.add(name, radius, delta, cost, fidelity=fidelity, self_check=check, mirror_check=mirror)
            before = deltas

    def published(self) -> None:
        """The published ε. For a gradient whose norm the loss scales to n, it is the radius ε·n."""
        for scaled in (self.norm, *NORMS):
            radius = PUBLISHED_EPS * scaled
            g2, fidelity = self.displaced(radius, "grid")
            self.add("published", radius, subtract(g2, self.g1), 2, fidelity=fidelity, scaled_norm=scaled)

    def sparse(self, radii: Iterable[float], fraction: float = 1e-3) -> None:
        """Move along the largest elements of g1 only, by as much as along g1."""
        sizes = torch.cat([g.flatten().abs().float()[:: max(1, g.numel() // 2**16)] for g in self.g1])
        least = torch.topk(sizes, max(1, round(fraction * sizes.numel()))).values[-1]
        direction = [torch.where(g.abs() >= least, g, 0) for g in self.g1]
        direction = [d * (self.norm / norm(direction)) for d in direction]
        for radius in radii:
            g2, fidelity = self.displaced(radius, "grid", direction)
            self.add("sparse", radius, subtract(g2, self.g1), 2, fidelity=fidelity)

    def doubly_backward(self) -> None:
        """H·g1 by double backward in this arithmetic. Its cost is measured; its radius has no meaning."""
        start = time.process_time()
        _, product = self.passes.exact(self.batch, rows=sequences_at_once(self.batch))
        cost = (time.process_time() - start) / self.seconds
        self.add("exact", TOP / 4, [h * (TOP / 4 / self.norm) for h in product], round(cost, 1))


def _cosine(a: Tensors, b: Tensors) -> float:
    products = gram(a, b)
    return float(products[0, 1] / (products[0, 0] * products[1, 1]).sqrt())


def sequences_at_once(batch: Batch) -> int:
    """The sequences of a micro-batch of 256 tokens, whose double backward fits into a small machine."""
    return max(1, 256 * len(batch.tokens) // batch.size)


def measure(
    model: torch.nn.Module, masters: Tensors, batch: Batch, arithmetics: list[str], save: Callable[[list[Row]], None]
) -> None:
    """Measure one batch; ``save`` gets the rows of each arithmetic."""
    reference = Passes(model, masters, ARITHMETICS["fp32"])
    exact = reference.exact(batch, rows=sequences_at_once(batch))
    for name in arithmetics:
        start = time.perf_counter()
        about = {"batch": batch.name, "kind": batch.kind, "tokens": batch.size, "arithmetic": name, "norm": norm(exact[0])}
        at = Measurement(Passes(model, masters, ARITHMETICS[name]), batch, exact, about)
        if name == "bf16":
            at.sweep(halvings(TOP, COUNT), central=True)
            at.sweep(halvings(TOP, COUNT), "grid")
            at.sweep(RADII, "stochastic")
            at.published()
            at.sparse(RADII[3:])
            at.doubly_backward()
        elif name == "fp32":
            at.sweep(halvings(TOP, COUNT))
        else:
            at.sweep(RADII, central=True)
            if name == "fp16 passes over bf16 weights":
                at.sweep(RADII[:3], "stochastic")
                at.sweep(RADII[:3], "grid")
        save(at.rows)
        print(f"{batch.name}, {name}: floor {at.floor:.3f}, {time.perf_counter() - start:.0f} s", flush=True)


def write(rows: list[Row], output: Path, title: str, settings: Row, stamped: dict[str, str]) -> str:
    """Write JSON, document and picture; return the document."""
    document = markdown(rows, title, stamped)
    output.parent.mkdir(parents=True, exist_ok=True)
    report = {"stamp": stamped, "settings": settings, "rows": rows}
    # Not with_suffix: a name may hold a dot.
    (output.parent / f"{output.name}.json").write_text(json.dumps(report, indent=0) + "\n", encoding="utf-8")
    (output.parent / f"{output.name}.md").write_text(document, encoding="utf-8")
    figure(rows, output.parent / f"{output.name}.png", title)
    return document


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", choices=list(MODELS))
    parser.add_argument("--quick", action="store_true", help="one batch of 256 tokens and two arithmetics")
    names = [f"{kind}-{size}-{seed}" for kind, size, seed in BATCHES]
    parser.add_argument(
        "--batches", nargs="+", choices=names, metavar="NAME", help="measure only these, such as policy-1024-0"
    )
    parser.add_argument("--arithmetics", nargs="+", choices=list(ARITHMETICS), metavar="NAME", help="measure only these")
    parser.add_argument(
        "--render", nargs="+", type=existing, metavar="JSON", help="measure nothing; join the rows of these files"
    )
    parser.add_argument("--output", type=Path, default=todays("difference-accuracy"), help="path without suffix")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    settings = {name: value for name, value in vars(args).items() if name in ("model", "quick", "batches", "arithmetics")}
    if args.render:
        reports = [json.loads(path.read_text(encoding="utf-8")) for path in args.render]
        keys = ("batch", "arithmetic", "scheme", "radius")  # of a row that was measured twice, keep that of the later file
        found = {tuple(row[key] for key in keys): row for report in reports for row in report["rows"]}
        batches = " ".join(dict.fromkeys(row["batch"] for row in found.values()))
        program = "python -m benchmarks.precision.difference_accuracy"
        command = f"{program} --batches {batches}, in {len(reports)} runs joined by --render"
        print(write([*found.values()], args.output, args.model, settings, reports[-1]["stamp"] | {"command": command}))
        return
    warnings.filterwarnings("ignore", "The AccumulateGrad node|.*create_graph")
    model = MODELS[args.model]()
    masters = jitter_(model)
    wanted = BATCHES[1:2] if args.quick else BATCHES
    rows = []

    def save(more: list[Row]) -> None:
        rows.extend(more)
        write(rows, args.output, args.model, settings, stamp())

    for kind, size, seed in wanted:
        name = f"{kind}-{size}-{seed}"
        if args.batches and name not in args.batches:
            continue
        batch = make_batch(Passes(model, masters, ARITHMETICS["fp32"]).model, kind, size, seed)
        names = ["bf16", *(OTHERS if name in COMPARED else [])]
        if args.quick:
            names = ["bf16", "fp32", "autocast bf16"]
        measure(model, masters, batch, args.arithmetics or names, save)
    print(markdown(rows, args.model, stamp()))
    print(f"written to {args.output}.md, .json and .png")


if __name__ == "__main__":
    main()
