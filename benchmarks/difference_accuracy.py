"""Which finite difference of two gradients is curvature, and which is rounding noise?

    python benchmarks/difference_accuracy.py                # SmolLM2-135M, all batches: about an hour on two CPU cores
    python benchmarks/difference_accuracy.py --quick        # one batch of 256 tokens of it: minutes
    python benchmarks/difference_accuracy.py --model random --quick    # seconds; shows that everything runs

Every estimate (g2 − g1)/ε is compared with H·g1 by double backward in float32: cosine, ratio of the norms, projection
⟨estimate, H·g1⟩/‖H·g1‖², and the cosine of the combined gradient g1 + (γ/ε)(g2 − g1) with the exact one at γ/ε of 1, 10
and 100. The schemes (difference_schemes.py holds them, and what a batch is):

- ``published``   bf16 weights moved on their own grid by ε = 1e-3, for gradients scaled to several norms
- ``grid``        the same by a radius ρ = ε·‖g1‖
- ``stochastic``  the same, rounded up or down at random
- ``sparse``      the same along the largest 0.1% of the elements of g1
- ``master``      from float32 masters, rounded to bf16
- ``central``     (g(θ + εd) − g(θ − εd))/2 from masters: three gradients
- ``exact``       double backward in bf16
- ``auto``        ``master`` at the radius where ‖g2 − g1‖/‖g1‖ is a multiple of the measured noise floor

Besides plain bf16 the passes run in other arithmetics, of which the one that matters is fp16 over bf16 weights: under
``torch.autocast(float16)`` with a loss scale and a float32 residual stream, at the speed of bf16 where fp16 has hardware.

A gradient's scale changes nothing but the radius that a given ε means: multiplying the loss by a power of two multiplies
every rounding error by it. What is measured by radius therefore holds at every scale.

The document goes to ``results/<date>-difference-accuracy.md``, with a picture and a JSON file of every figure.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from difference_schemes import (
    ARITHMETICS,
    MODELS,
    WEIGHTS,
    Batch,
    Figures,
    Passes,
    Tensors,
    gram,
    halvings,
    jitter_,
    make_batch,
    norm,
    subtract,
)
from step_cost import RESULTS, stamp

Row = dict[str, Any]

TOP, COUNT = 0.04, 6  # the largest radius, and how many, each half of the one above
SOME = (0.0025, 0.005, 0.01, 0.02)
PUBLISHED_EPS = 1e-3
NORMS = (0.05, 0.5)  # of the scaled gradient, for a fixed ε; its own norm besides, and 10 is ρ = 0.01
BATCHES = [  # kind, trained tokens, seed; in order of what is missed most if a run is cut short
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
COMPARED = ("policy-256-0", "sharp-256-0")  # where all arithmetics run; bf16 runs everywhere
RULES: dict[str, Callable[[float], float]] = {  # what ‖g2 − g1‖/‖g1‖ should be, given the noise floor
    "1.5 × floor": lambda floor: 1.5 * floor,
    "2 × floor": lambda floor: 2 * floor,
    "3 × floor": lambda floor: 3 * floor,
    "4.5 × floor": lambda floor: 4.5 * floor,
    "0.5·√floor": lambda floor: 0.5 * math.sqrt(floor),
    "0.65·√floor": lambda floor: 0.65 * math.sqrt(floor),
    "0.8·√floor": lambda floor: 0.8 * math.sqrt(floor),
    "0.02": lambda _: 0.02,
}
AUTO = "0.65·√floor"
ADAPTED = [
    ("bf16", "master"),
    ("bf16", "central"),
    ("fp16 passes over bf16 weights", "master"),
    ("autocast fp16", "master"),
    ("fp32", "master"),
]


class Measurement:
    """One batch in one arithmetic: g1, its noise floor, and rows of figures for estimates at any radius."""

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
        """The gradient at θ + ε·d and the fidelity; ε makes ε·‖g1‖ the radius."""
        fidelity = self.passes.displace(direction or self.g1, radius / self.norm, rounding, self.random)
        gradient = self.passes.gradient(self.batch)
        self.passes.restore()
        return gradient, fidelity

    def add(self, scheme: str, radius: float, delta: Tensors, cost: float, **extra: float) -> None:
        """Compare δ with ε·H·g1 and note the row."""
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
        """Forward differences by radius, and central ones of the same passes; each compared with the one at half of it."""
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
        """A fixed ε, on the grid. A gradient scaled to norm n by the loss makes it the radius ε·n."""
        for scaled in (self.norm, *NORMS):
            radius = PUBLISHED_EPS * scaled
            g2, fidelity = self.displaced(radius, "grid")
            self.add("published", radius, subtract(g2, self.g1), 2, fidelity=fidelity, scaled_norm=scaled)

    def sparse(self, radii: Iterable[float], fraction: float = 1e-3) -> None:
        """Along the largest elements of g1 alone, as long as g1, on the grid."""
        sizes = torch.cat([g.flatten().abs().float()[:: max(1, g.numel() // 2**16)] for g in self.g1])
        least = torch.topk(sizes, max(1, round(fraction * sizes.numel()))).values[-1]
        direction = [torch.where(g.abs() >= least, g, 0) for g in self.g1]
        direction = [d * (self.norm / norm(direction)) for d in direction]
        for radius in radii:
            g2, fidelity = self.displaced(radius, "grid", direction)
            self.add("sparse", radius, subtract(g2, self.g1), 2, fidelity=fidelity)

    def doubly_backward(self) -> None:
        """H·g1 by double backward in this arithmetic; its radius is for the table alone, its cost is measured."""
        start = time.process_time()
        _, product = self.passes.exact(self.batch, rows=_rows(self.batch))
        cost = (time.process_time() - start) / self.seconds
        self.add("exact", TOP / 4, [h * (TOP / 4 / self.norm) for h in product], round(cost, 1))


def _cosine(a: Tensors, b: Tensors) -> float:
    products = gram(a, b)
    return float(products[0, 1] / (products[0, 0] * products[1, 1]).sqrt())


def _rows(batch: Batch) -> int:
    """Sequences in a micro-batch of 256 tokens, whose graph of graphs fits a small machine."""
    return max(1, 256 * len(batch.tokens) // batch.size)


def measure(
    model: torch.nn.Module, masters: Tensors, batch: Batch, arithmetics: list[str], save: Callable[[list[Row]], None]
) -> None:
    """All rows of one batch, handed to ``save`` arithmetic by arithmetic."""
    reference = Passes(model, masters, ARITHMETICS["fp32"])
    exact = reference.exact(batch, rows=_rows(batch))
    for name in arithmetics:
        start = time.perf_counter()
        about = {"batch": batch.name, "kind": batch.kind, "tokens": batch.size, "arithmetic": name, "norm": norm(exact[0])}
        at = Measurement(Passes(model, masters, ARITHMETICS[name]), batch, exact, about)
        if name == "bf16":
            at.sweep(halvings(TOP, COUNT), central=True)
            at.sweep(halvings(TOP, COUNT), "grid")
            at.sweep(SOME, "stochastic")
            at.published()
            at.sparse(SOME[3:])
            at.doubly_backward()
        elif name == "fp32":
            at.sweep(halvings(TOP, COUNT))
        else:
            at.sweep(SOME, central=True)
            if name == "fp16 passes over bf16 weights":
                at.sweep(SOME[:3], "stochastic")
                at.sweep(SOME[:3], "grid")
        save(at.rows)
        print(f"{batch.name}, {name}: floor {at.floor:.3f}, {time.perf_counter() - start:.0f} s", flush=True)


# ----------------------------------------------------------------------------------------------- what the rows amount to


def select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def automatic(rows: list[Row], rule: str, arithmetic: str = "bf16", scheme: str = "master") -> list[Row]:
    """Of each batch's sweep the row whose rel is nearest to what the rule wants: what ``auto`` would have chosen.

    Radii are halvings of one another, so this is the choice of a controller that only halves and doubles.
    """
    sweeps: dict[str, list[Row]] = {}
    for row in select(rows, arithmetic=arithmetic, scheme=scheme):
        sweeps.setdefault(row["batch"], []).append(row)
    chosen = []
    for sweep in sweeps.values():
        wanted = RULES[rule](sweep[0]["floor"] * (2 if scheme == "central" else 1))
        chosen.append(min(sweep, key=lambda row: abs(math.log(row["rel"] / wanted))))
    return chosen


def spread(values: list[float]) -> str:
    """Median and range."""
    if not values:
        return ""
    middle = f"{statistics.median(values):.2f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.2f} to {max(values):.2f})"


def _table(head: list[str], body: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(line) + " |" for line in body), ""]


def by_radius(rows: list[Row]) -> list[str]:
    """Cosine of every scheme at every radius, on policy-gradient batches and on the others."""
    out = []
    for title, kinds in (("policy-gradient batches", ("policy",)), ("sharp batches", ("sharp",)), ("text", ("text",))):
        own = [row for row in select(rows, arithmetic="bf16") if row["kind"] in kinds]
        if not own:
            continue
        radii = sorted({row["radius"] for row in own if row["scheme"] == "master"})
        body = []
        for scheme in ("grid", "stochastic", "sparse", "master", "central"):
            cells = [[row["cosine"] for row in select(own, scheme=scheme, radius=radius)] for radius in radii]
            body.append([scheme, *map(spread, cells)])
        exact = select(own, scheme="exact")
        count = len({row["batch"] for row in own})
        out += [f"Cosine with H·g1, bf16, {title} ({count}): median (worst to best)", ""]
        out += _table(["scheme", *(f"ρ = {radius:g}" for radius in radii)], body)
        out += [
            f"Exact product in bf16: {spread([row['cosine'] for row in exact])}, "
            f"at {spread([row['gradients'] for row in exact])} gradients (measured).",
            "",
        ]
    return out


def by_scheme(rows: list[Row]) -> list[str]:
    """Everything measured, at each scheme's best single radius by the median over all batches."""
    own = select(rows, arithmetic="bf16")
    body = []
    for scheme in ("published", "grid", "stochastic", "sparse", "master", "central", "exact"):
        mine = [row for row in select(own, scheme=scheme) if scheme != "published" or row["scaled_norm"] not in NORMS]
        if not mine:
            continue
        choices = [mine] if scheme == "published" else [select(mine, radius=r) for r in {row["radius"] for row in mine}]
        best = max(choices, key=lambda choice: statistics.median(row["cosine"] for row in choice))
        label = "ε = 0.001" if scheme == "published" else "" if scheme == "exact" else f"ρ = {best[0]['radius']:g}"
        body.append(_line(scheme, label, best))
    for name in ("autocast bf16", "fp16 passes over bf16 weights", "autocast fp16"):
        for scheme in ("grid", "stochastic", "master", "central"):
            mine = select(rows, arithmetic=name, scheme=scheme)
            choices = [select(mine, radius=radius) for radius in {row["radius"] for row in mine}]
            if choices:
                best = max(choices, key=lambda choice: statistics.median(row["cosine"] for row in choice))
                body.append(_line(f"{scheme}, {name}", f"ρ = {best[0]['radius']:g}", best))
    body.append(_line("auto (master)", f"rel = {AUTO}", automatic(rows, AUTO)))
    fixed_eps = [[scaled, select(own, scheme="published", scaled_norm=scaled)] for scaled in NORMS]
    body += [_line("published", f"ε = 0.001, ‖g1‖ scaled to {scaled:g}", found) for scaled, found in fixed_eps if found]
    names = ["scheme", "step", "gradients", "cosine", "norm ratio", "projection", "fidelity"]
    names += [f"combined, γ/ε = {weight}" for weight in WEIGHTS] + [f"shrunk, {weight}" for weight in WEIGHTS]
    title = "All batches, each scheme at the radius of its best median cosine: median (worst to best)"
    return [title, "", *_table(names, body)]


def _line(scheme: str, step: str, rows: list[Row]) -> list[str]:
    keys = ["gradients", "cosine", "norm_ratio", "projection", "fidelity"]
    keys += [f"combined_{weight}" for weight in WEIGHTS] + [f"shrunk_{weight}" for weight in WEIGHTS]
    return [scheme, step, *(spread([row[key] for row in rows if row.get(key) is not None]) for key in keys)]


def adaptive(rows: list[Row]) -> list[str]:
    """The radius chosen by the noise floor, by several rules, beside every fixed radius."""
    body = []
    for arithmetic, scheme in ADAPTED:
        own = select(rows, arithmetic=arithmetic, scheme=scheme)
        for rule in RULES if own else ():
            chosen = automatic(own, rule, arithmetic, scheme)
            radii = [row["radius"] for row in chosen]
            cells = [spread([row[key] for row in chosen]) for key in ("cosine", "norm_ratio")]
            body.append([arithmetic, scheme, f"rel = {rule}", *cells, f"{min(radii):g} to {max(radii):g}", str(len(chosen))])
        for radius in sorted({row["radius"] for row in own}):
            fixed = select(own, radius=radius)
            cells = [spread([row[key] for row in fixed]) for key in ("cosine", "norm_ratio")]
            body.append([arithmetic, scheme, "fixed ρ", *cells, f"{radius:g}", str(len(fixed))])
    names = ["arithmetic", "scheme", "rule", "cosine", "norm ratio", "radius", "batches"]
    return ["Choosing the radius by the noise floor: median (worst to best) over batches", "", *_table(names, body)]


def by_arithmetic(rows: list[Row]) -> list[str]:
    """What the precision of the passes does, batch by batch: the noise floor is its own, the radius the user's."""
    body = []
    for batch in dict.fromkeys(row["batch"] for row in rows):
        for name in ARITHMETICS:
            own = select(rows, batch=batch, arithmetic=name)
            forward = select(own, scheme="master")
            if not forward or len({row["arithmetic"] for row in select(rows, batch=batch)}) == 1:
                continue
            cells = [batch, name, f"{forward[0]['floor']:.4f}", f"{forward[0]['g1_cosine']:.4f}"]
            for scheme in ("master", "central"):
                cells += [spread([row["cosine"] for row in select(own, scheme=scheme, radius=radius)]) for radius in SOME]
            body.append(cells)
    names = ["batch", "arithmetic", "floor", "cosine of g1", *(f"forward, {radius:g}" for radius in SOME)]
    names += [f"central, {radius:g}" for radius in SOME]
    return ["Arithmetic of the passes, from masters: cosine with H·g1", "", *_table(names, body)]


def checks(rows: list[Row]) -> list[str]:
    """How well each diagnostic separates usable estimates from noise."""
    own = [row for row in select(rows, arithmetic="bf16") if row["scheme"] in ("master", "grid", "stochastic")]
    body = []
    for name, value in (
        ("cosine of the estimates at ρ and ρ/2", lambda row: row.get("self_check")),
        ("cosine of the estimates at ρ and −ρ", lambda row: row.get("mirror_check")),
        ("rel/floor", lambda row: row["rel"] / row["floor"] if row["floor"] else None),
        ("fidelity", lambda row: row.get("fidelity")),
    ):
        pairs = [(value(row), usable(row)) for row in own if value(row) is not None]
        if not pairs:
            continue
        threshold, right = _best_threshold(pairs)
        body.append([name, f"{threshold:.2f}", f"{right:.0%}", str(len(pairs)), f"{sum(good for _, good in pairs)}"])
    title = (
        "Diagnostics: the threshold that best separates usable estimates (cosine ≥ 0.7, half to twice as long as H·g1) from "
    )
    names = ["diagnostic", "threshold", "right", "estimates", "of these usable"]
    return [f"{title}the rest, and how often it is right", "", *_table(names, body)]


def usable(row: Row) -> bool:
    """Noise may point along H·g1, both being dominated by the same few directions; its length then gives it away."""
    return row["cosine"] >= 0.7 and 0.5 <= row["norm_ratio"] <= 2


def _best_threshold(pairs: list[tuple[float, bool]]) -> tuple[float, float]:
    """The value that maximises the mean of the two rates of being right: usable above it, not usable below."""

    def right(threshold: float) -> float:
        rates = []
        for wanted in (True, False):
            group = [(value >= threshold) == wanted for value, good in pairs if good == wanted]
            rates += [sum(group) / len(group)] if group else []
        return statistics.mean(rates)

    best = max((value for value, _ in pairs), key=right)
    return best, right(best)


COLOURS = {
    "grid": "tab:orange",
    "stochastic": "tab:green",
    "sparse": "tab:brown",
    "master": "tab:blue",
    "central": "tab:red",
}


def figure(rows: list[Row], path: Path, title: str) -> None:
    """Cosine against radius, one line per scheme: the median over batches, and the range behind it."""
    kinds = [kind for kind in ("policy", "sharp", "text") if select(rows, kind=kind)]
    drawing, panels = plt.subplots(
        1, len(kinds), figsize=(2.5 + 4.5 * len(kinds), 4), layout="constrained", squeeze=False, sharey=True
    )
    for axes, kind in zip(panels[0], kinds, strict=True):
        own = select(rows, kind=kind, arithmetic="bf16")
        for scheme, colour in COLOURS.items():
            radii = sorted({row["radius"] for row in select(own, scheme=scheme)})
            cosines = [[row["cosine"] for row in select(own, scheme=scheme, radius=radius)] for radius in radii]
            axes.plot(radii, [statistics.median(c) for c in cosines], color=colour, label=scheme, marker="o", markersize=3)
            axes.fill_between(radii, list(map(min, cosines)), list(map(max, cosines)), color=colour, alpha=0.12, linewidth=0)
        published = select(own, scheme="published")
        axes.scatter(
            [r["radius"] for r in published], [r["cosine"] for r in published], color="black", s=14, label="published ε"
        )
        exact = [row["cosine"] for row in select(own, scheme="exact")]
        if exact:
            axes.axhline(statistics.median(exact), color="tab:gray", linestyle="--", linewidth=1, label="exact in bf16")
        for arithmetic, colour in (("fp16 passes over bf16 weights", "tab:purple"), ("fp32", "tab:gray")):
            wide = select(rows, kind=kind, arithmetic=arithmetic, scheme="master")
            radii = sorted({row["radius"] for row in wide})
            medians = [statistics.median(row["cosine"] for row in select(wide, radius=radius)) for radius in radii]
            axes.plot(radii, medians, color=colour, linewidth=1.5, label=f"master, {arithmetic}")
        axes.set_xscale("log")
        axes.set_xlim(left=5e-4)
        axes.set_ylim(-0.3, 1.02)
        axes.set_title(f"{kind}, batches: {len({row['batch'] for row in own})}", fontsize=10)
        axes.set_xlabel("radius ρ", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    panels[0][0].set_ylabel("cosine with H·g1")
    drawing.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    drawing.suptitle(title)
    drawing.savefig(path, dpi=150)
    plt.close(drawing)


def markdown(rows: list[Row], title: str, stamped: dict[str, str]) -> str:
    facts = [f"- {name}: {value}" for name, value in stamped.items()]
    tables = [*by_radius(rows), *by_scheme(rows), *adaptive(rows), *by_arithmetic(rows), *checks(rows)]
    return "\n".join(["# Accuracy of the finite difference", "", title, "", *facts, "", *tables])


def write(rows: list[Row], output: Path, title: str, settings: Row, stamped: dict[str, str]) -> str:
    """JSON, document and picture; returns the document."""
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
    parser.add_argument("--batches", nargs="+", metavar="NAME", help="some of the list, such as policy-1024-0")
    parser.add_argument(
        "--arithmetics", nargs="+", choices=list(ARITHMETICS), metavar="NAME", help="instead of each batch's own"
    )
    parser.add_argument("--render", nargs="+", type=Path, metavar="JSON", help="measure nothing; join these files' figures")
    parser.add_argument(
        "--output", type=Path, default=RESULTS / f"{date.today()}-difference-accuracy", help="without suffix"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    settings = {name: value for name, value in vars(args).items() if name in ("model", "quick", "batches", "arithmetics")}
    if args.render:
        reports = [json.loads(path.read_text(encoding="utf-8")) for path in args.render]
        keys = ("batch", "arithmetic", "scheme", "radius")  # of a row measured twice the later file's stays
        found = {tuple(row[key] for key in keys): row for report in reports for row in report["rows"]}
        batches = " ".join(dict.fromkeys(row["batch"] for row in found.values()))
        command = f"python benchmarks/difference_accuracy.py --batches {batches}, in {len(reports)} runs joined by --render"
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
