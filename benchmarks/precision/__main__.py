"""How accurate is the penalty γ·H·g1 that the optimizer adds, in half precision, and does it find its radius?

    python -m benchmarks.precision                        # SmolLM2-135M, twelve batches of 80 to 1024 tokens:
    an hour
    python -m benchmarks.precision --model random         # a small random model, in seconds

Every row is one real step of ``GradRegOptimizer``, with its own rounding. What it adds to g1 is compared with
H·g1 by double backward in float32, at the weights that the passes see. The rows of a batch in one arithmetic:
the published ε, each radius of a grid, and ``radius="auto"`` in its fifth step, without and with
``method="central"``. Learning rates are 0, so that all steps start from the same weights; after a first step
g1, which stays the same, is not computed again.

*Combined* is the whole gradient g1 + k·ε·H·g1 with k = γ/ε of 1 and 10, shrunk by its signal, and beside it
g1 alone: both by their cosine with the exact one.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import time
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.common.arguments import add_output
from benchmarks.common.results import stamp, todays, write_both
from benchmarks.common.tables import markdown_table
from benchmarks.precision.exact import exact, jittered, set_weights_
from benchmarks.precision.language_models import ARITHMETICS, KINDS, MODELS, SHAPES, Batch, loss, make_batch
from gradreg_optim import GradRegOptimizer

LOSS_SCALE = 4096.0
STEPS = 5
"""How many steps ``radius="auto"`` has to find its radius."""
GRID = (0.005, 0.01, 0.02)
CENTRAL_GRID = (0.01, 0.02)
PASSES = ("autocast bf16", "bf16", "autocast fp16")
BATCHES = [f"{kind}-80-{seed}" for seed in (7, 8, 9) for kind in KINDS]
BATCHES += ["policy-256-7", "sharp-256-7", "policy-1024-7"]
"""Kind, trained tokens, seed. The rule of ``auto`` was chosen by batches of seed 0, not by these."""
WITH_CENTRAL = BATCHES[:3]
"""On these central differences are measured as well."""
RATIOS = (1, 10)
"""γ/ε of the combined gradients."""

KEPT = ("noise_floor", "signal", "self_check", "perturbation_fidelity")
"""The metrics of the optimizer in each row."""

Row = dict[str, Any]


class Bench:
    """One batch in one arithmetic: steps of the optimizer at the same weights, compared with the truth."""

    def __init__(
        self,
        model: nn.Module,
        weights: list[Tensor],
        batch: Batch,
        passes: str,
        truth: tuple[list[Tensor], list[Tensor]],
    ) -> None:
        self.model, self.batch, self.passes, self.truth = model, batch, passes, truth
        self.how = ARITHMETICS[passes]
        set_weights_(model, weights, self.how.weights)
        self.first: list[Tensor] = []  # g1 as the passes compute it, and its loss
        self.loss = torch.zeros(())

    def step(self, steps: int = 1, **settings: Any) -> Row:
        """Take ``steps`` steps and compare what the last one adds."""
        parameters = list(self.model.parameters())
        scale = LOSS_SCALE if self.how.autocast == torch.float16 else 1.0
        scaler = torch.amp.GradScaler("cpu", init_scale=LOSS_SCALE) if scale != 1 else None
        base = torch.optim.SGD(parameters, lr=0.0)
        unbounded = {"g1_clip": None, "g2_clip": None, "shrink": False}
        optimizer = GradRegOptimizer(base, strength=1.0, scaler=scaler, **unbounded, **settings)
        is_at_start = is_first_step = True

        def closure() -> Tensor:
            nonlocal is_at_start
            optimizer.zero_grad()
            if is_at_start and self.first and not is_first_step:
                for parameter, gradient in zip(parameters, self.first, strict=True):
                    parameter.grad = gradient.clone()
                value = self.loss
            else:
                value = loss(self.model, self.batch, self.how)
                value = value if scaler is None else scaler.scale(value)
                value.backward()
            if is_at_start and not self.first:
                self.first, self.loss = [parameter.grad.clone() for parameter in parameters], value.detach()
            is_at_start = False
            return value

        for number in range(steps):
            is_at_start, is_first_step = True, number == 0
            optimizer.step(closure)
            if scaler is not None:
                scaler.update()
        metrics = {name: float(value) for name, value in optimizer.metrics.items()}
        figures = self.compared([p.grad for p in parameters], scale, metrics)
        optimizer.zero_grad()
        return {
            "batch": self.batch.name,
            "passes": self.passes,
            "settings": settings,
            **figures,
            **{name: metrics.get(name) for name in KEPT},
        }

    def compared(self, combined: list[Tensor], scale: float, metrics: dict[str, float]) -> Row:
        """Cosine and ratio of the penalty with H·g1, and of the combined gradient with the right one."""
        gram = torch.zeros(4, 4, dtype=torch.float64)
        for found, first, *right in zip(combined, self.first, *self.truth, strict=True):
            g1 = first.float() / scale
            four = torch.stack([x.float().flatten() for x in (g1, found.float() - g1, *right)])
            gram += (four @ four.T).double()
        eps, signal = metrics["eps"], metrics.get("signal", 1.0)
        row = {
            "cosine": float(gram[1, 3] / (gram[1, 1] * gram[3, 3]).sqrt()),
            "ratio": float((gram[1, 1] / gram[3, 3]).sqrt()),
            "radius": eps * metrics["g1_norm"],
        }
        for k in RATIOS:
            right = torch.tensor([0, 0, 1, k * eps], dtype=torch.float64)
            for name, weight in ((f"combined_{k}", k * eps * signal), (f"g1_alone_{k}", 0.0)):
                ours = torch.tensor([1, weight, 0, 0], dtype=torch.float64)
                lengths = ((ours @ gram @ ours) * (right @ gram @ right)).sqrt()
                row[name] = float(ours @ gram @ right / lengths)
        return row


def measure(model: nn.Module, masters: list[Tensor], batch: Batch, passes: list[str]) -> list[Row]:
    """The rows of one batch."""
    rounded = [master.bfloat16().float() for master in masters]
    set_weights_(model, rounded, torch.float32)
    truth = exact(model, batch)
    rows = []
    for name in passes:
        bench = Bench(model, masters if name == "autocast bf16" else rounded, batch, name, truth)
        settings: list[tuple[int, Row]] = [(STEPS, {"radius": "auto"})]
        settings += [(1, {"eps": 1e-3, "rounding": "nearest", "check_every": 0})]  # as published
        settings += [(1, {"radius": radius, "check_every": 0}) for radius in GRID]
        if batch.name in WITH_CENTRAL:
            settings += [(STEPS, {"radius": "auto", "method": "central"})]
            central = {"check_every": 0, "method": "central"}
            settings += [(1, {"radius": radius, **central}) for radius in CENTRAL_GRID]
        for steps, chosen in settings:
            rows.append(bench.step(steps, **chosen))
            tqdm.write(json.dumps(rows[-1]))
    return rows


def kind_of(row: Row) -> str:
    """published, fixed, auto; and the same of central."""
    settings = row["settings"]
    name = "auto" if settings.get("radius") == "auto" else "fixed" if "radius" in settings else "published"
    return f"{name}, central" if settings.get("method") == "central" else name


def summary(rows: list[Row]) -> list[Row]:
    """For each batch and arithmetic: the published ε, radius 0.005, auto, and the best radius of the grid."""
    found = []
    for batch, passes in dict.fromkeys((row["batch"], row["passes"]) for row in rows):
        of_both = [row for row in rows if (row["batch"], row["passes"]) == (batch, passes)]
        kinds: dict[str, list[Row]] = {}
        for row in of_both:
            kinds.setdefault(kind_of(row), []).append(row)
        line: Row = {"batch": batch, "passes": passes}
        for suffix in ("", ", central"):
            if f"auto{suffix}" not in kinds:
                continue
            best = max(kinds[f"fixed{suffix}"], key=lambda row: row["cosine"])
            [auto] = kinds[f"auto{suffix}"]
            line |= {f"auto{suffix}": auto["cosine"], f"best{suffix}": best["cosine"]}
            line |= {
                f"radius of auto{suffix}": auto["radius"],
                f"best radius{suffix}": best["settings"]["radius"],
            }
            if not suffix:
                line["fixed 0.005"] = next(
                    r["cosine"] for r in kinds["fixed"] if r["settings"]["radius"] == 0.005
                )
                line["published"] = kinds["published"][0]["cosine"]
                line |= {name: auto[name] for name in auto if name.startswith(("combined", "g1_alone"))}
                line |= {name: auto[name] for name in ("noise_floor", "signal")}
        found.append(line)
    return found


def markdown(rows: list[Row], title: str, stamped: dict[str, str]) -> str:
    """The document."""
    lines = [
        f"# Precision through the optimizer: {title}",
        "",
        *(f"- {k}: {v}" for k, v in stamped.items()),
        "",
    ]
    lines += [
        "Cosines with H·g1: medians over the batches, and the worst; without central, two gradients.",
        "",
    ]
    lines_of = summary(rows)
    names = ["published", "fixed 0.005", "auto", "best", "auto, central", "best, central"]
    cells = []
    for passes in dict.fromkeys(line["passes"] for line in lines_of):
        found = [
            [line[name] for line in lines_of if line["passes"] == passes and name in line] for name in names
        ]
        cells.append([passes, *(f"{statistics.median(x):.3f} ({min(x):.3f})" if x else "" for x in found)])
    lines += [*markdown_table(["passes", *names], cells), ""]
    names += ["radius of auto", "best radius", "noise_floor", "signal"]
    names += [f"{name}_{k}" for k in RATIOS for name in ("combined", "g1_alone")]
    for passes in dict.fromkeys(line["passes"] for line in lines_of):
        lines += [f"## {passes}", ""]
        chosen = [line for line in lines_of if line["passes"] == passes]
        cells = [[line["batch"], *(_number(line.get(name)) for name in names)] for line in chosen]
        lines += [*markdown_table(["batch", *(name.replace("_", " ") for name in names)], cells), ""]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.3g}"


def named(text: str) -> str:
    """A name of :data:`BATCHES` or of its kind: kind-tokens-seed."""
    if not re.fullmatch(rf"({'|'.join(KINDS)})-({'|'.join(map(str, SHAPES))})-[0-9]+", text):
        kinds, sizes = ", ".join(KINDS), ", ".join(map(str, SHAPES))
        words = f"{text!r} is no kind-tokens-seed; kinds are {kinds}, tokens {sizes}"
        raise argparse.ArgumentTypeError(words)
    return text


def main(argv: list[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser("python -m benchmarks.precision", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    several: Row = {"nargs": "+", "metavar": "NAME"}
    parser.add_argument(
        "--batches", type=named, default=BATCHES, help="kind-tokens-seed: policy-80-0", **several
    )
    parser.add_argument("--passes", choices=PASSES, default=PASSES, help="arithmetics", **several)
    add_output(parser, "precision")
    arguments = parser.parse_args(argv)
    output = arguments.output or todays("precision")
    warnings.filterwarnings("ignore", "Gradient regularization: ")  # figures of the table
    warnings.filterwarnings("ignore", ".*create_graph|The AccumulateGrad node")
    model = MODELS[arguments.model]()
    masters = jittered(model)
    start, rows = time.perf_counter(), list[Row]()
    for name in tqdm(arguments.batches, unit="batch"):
        kind, size, seed = name.split("-")
        set_weights_(model, [master.bfloat16() for master in masters], torch.float32)
        batch = make_batch(model, kind, int(size), int(seed))
        rows += measure(model, masters, batch, arguments.passes)
        stamped = {**stamp(), "seconds": f"{time.perf_counter() - start:.0f}"}
        write_both(output, {**stamped, "rows": rows}, markdown(rows, arguments.model, stamped))
    print(markdown(rows, arguments.model, stamped))


if __name__ == "__main__":
    main()
