"""The tables and the picture of difference_accuracy, made of its rows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.common.language_models import ARITHMETICS, KINDS
from benchmarks.common.tables import markdown_table
from benchmarks.precision.difference_schemes import NORMS, RADII, WEIGHTS

__all__ = ["figure", "markdown"]

Row = dict[str, Any]

RULES: dict[str, Callable[[float], float]] = {  # the wanted ‖g2 − g1‖/‖g1‖, given the noise floor
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


def select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows that have these values."""
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def automatic(rows: list[Row], rule: str, arithmetic: str = "bf16", scheme: str = "master") -> list[Row]:
    """The rows that ``auto`` would have chosen: of each batch, the one whose rel is nearest to what the rule wants.

    Each radius is twice the one before, so this is the choice of a controller that only halves and doubles.
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


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [*markdown_table(head, rows), ""]


def by_radius(rows: list[Row]) -> list[str]:
    """The cosine of every scheme at every radius, one table for each kind of batch."""
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
    """All figures, each scheme at the radius whose median cosine over all batches is best."""
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
    """Radii that several rules choose by the noise floor, compared with every fixed radius."""
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
    """The effect of the arithmetic of the passes, batch by batch."""
    body = []
    for batch in dict.fromkeys(row["batch"] for row in rows):
        for name in ARITHMETICS:
            own = select(rows, batch=batch, arithmetic=name)
            forward = select(own, scheme="master")
            if not forward or len({row["arithmetic"] for row in select(rows, batch=batch)}) == 1:
                continue
            cells = [batch, name, f"{forward[0]['floor']:.4f}", f"{forward[0]['g1_cosine']:.4f}"]
            for scheme in ("master", "central"):
                cells += [spread([row["cosine"] for row in select(own, scheme=scheme, radius=radius)]) for radius in RADII]
            body.append(cells)
    names = ["batch", "arithmetic", "floor", "cosine of g1", *(f"forward, {radius:g}" for radius in RADII)]
    names += [f"central, {radius:g}" for radius in RADII]
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
        threshold, right = best_threshold(pairs)
        body.append([name, f"{threshold:.2f}", f"{right:.0%}", str(len(pairs)), f"{sum(good for _, good in pairs)}"])
    title = (
        "Diagnostics: the threshold that best separates usable estimates (cosine ≥ 0.7, half to twice as long as H·g1) from "
    )
    names = ["diagnostic", "threshold", "right", "estimates", "of these usable"]
    return [f"{title}the rest, and how often it is right", "", *_table(names, body)]


def usable(row: Row) -> bool:
    """Whether an estimate is accurate, by cosine and length.

    The cosine is not enough: the same few directions dominate noise and H·g1, so noise can have a high one.
    """
    return row["cosine"] >= 0.7 and 0.5 <= row["norm_ratio"] <= 2


def best_threshold(pairs: list[tuple[float, bool]]) -> tuple[float, float]:
    """The threshold that best separates usable (above) from not usable (below), and the mean of the two rates of success."""

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
    """Draw the cosine against the radius, one line for each scheme: the median over batches, and the range."""
    kinds = [kind for kind in KINDS if select(rows, kind=kind)]
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
    """The document."""
    facts = [f"- {name}: {value}" for name, value in stamped.items()]
    tables = [*by_radius(rows), *by_scheme(rows), *adaptive(rows), *by_arithmetic(rows), *checks(rows)]
    return "\n".join(["# Accuracy of the finite difference", "", title, "", *facts, "", *tables])
