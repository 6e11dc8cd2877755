"""How accurate is the penalty γ·H·g1 that the optimizer adds, in each arithmetic and with which settings?

    python -m benchmarks.precision                        # SmolLM2-135M, policy-gradient batches of 80 and 256 tokens
    python -m benchmarks.precision --model random         # a small random model, in seconds

For every row ``GradRegOptimizer`` takes one real step, with its own rounding and its own checks. The penalty that it adds is
compared with that of ``method="exact"`` in float32. The other benchmarks in this folder compute the difference themselves,
for many more schemes.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.language_models import ARITHMETICS, MODELS, Batch, loss, make_batch
from benchmarks.common.results import stamp, todays
from benchmarks.common.tables import markdown_table
from benchmarks.precision.difference_schemes import jitter_
from gradreg_optim import GradRegOptimizer

LOSS_SCALE = 4096.0
RADIUS = 0.005
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("fp32", {"radius": 0.0025}),
    ("fp32", {"radius": 0.0025, "method": "central"}),
    ("autocast fp16", {"radius": RADIUS}),
    ("fp16 passes over bf16 weights", {"radius": RADIUS}),
    ("fp16 passes over bf16 weights", {"radius": RADIUS, "method": "central"}),
    ("autocast bf16", {"radius": RADIUS}),
    ("bf16", {"radius": RADIUS}),
    ("bf16", {"radius": RADIUS, "rounding": "nearest"}),
    ("bf16", {"radius": RADIUS, "method": "central"}),
    ("bf16", {"method": "exact"}),
    ("bf16", {"eps": 1e-3, "rounding": "nearest"}),  # as published
]


def penalty(model: nn.Module, batch: Batch, arithmetic: str, **settings: Any) -> tuple[list[Tensor], dict[str, float]]:
    """What one step of ``GradRegOptimizer`` adds to g1 at strength 1, in float32, and its metrics."""
    how = replace(ARITHMETICS[arithmetic], loss_scale=1.0)
    for parameter in model.parameters():
        parameter.data, parameter.grad = parameter.data.to(how.weights), None
    scaler = torch.amp.GradScaler("cpu", init_scale=LOSS_SCALE) if how.autocast == torch.float16 else None
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    unclipped = {"g1_clip": None, "g2_clip": None, "shrink": False}
    optimizer = GradRegOptimizer(base, strength=1.0, check_every=1, scaler=scaler, **unclipped, **settings)
    first: list[Tensor] = []

    def closure() -> None:
        optimizer.zero_grad()
        value = loss(model, batch, how)
        (value if scaler is None else scaler.scale(value)).backward()
        if not first:
            first.extend(
                parameter.grad.float() / (1.0 if scaler is None else LOSS_SCALE) for parameter in model.parameters()
            )

    optimizer.step(closure)
    added = [parameter.grad.float().sub_(g1) for parameter, g1 in zip(model.parameters(), first, strict=True)]
    for parameter in model.parameters():
        parameter.data, parameter.grad = parameter.data.float(), None
    return added, {name: float(value) for name, value in optimizer.metrics.items()}


def inner(a: list[Tensor], b: list[Tensor]) -> float:
    """⟨a, b⟩, summed in float64."""
    return sum(float((x * y).sum(dtype=torch.float64)) for x, y in zip(a, b, strict=True))


def measure(model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
    """A row for each of ``SETTINGS``."""
    truth, figures = penalty(model, batch, "fp32", method="exact")
    rows = []
    for arithmetic, settings in SETTINGS:
        found, metrics = penalty(model, batch, arithmetic, **settings)
        rows.append(
            {
                "batch": batch.name,
                "passes": arithmetic,
                "settings": settings,
                "cosine": inner(found, truth) / (inner(found, found) * inner(truth, truth)) ** 0.5,
                "ratio": (inner(found, found) / inner(truth, truth)) ** 0.5,
                "gradient_norm": figures["g1_norm"],
                **{name: metrics.get(name) for name in ("noise_floor", "self_check", "perturbation_fidelity")},
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def markdown(rows: list[dict[str, Any]], title: str, stamped: dict[str, str]) -> str:
    """The document."""
    columns = {"cosine": ".2f", "ratio": ".2f", "self_check": ".2f", "noise_floor": ".4f", "perturbation_fidelity": ".2f"}
    lines = [
        f"# Precision through the optimizer: {title}",
        "",
        *(f"- {name}: {value}" for name, value in stamped.items()),
        "",
    ]
    for name in dict.fromkeys(row["batch"] for row in rows):
        chosen = [row for row in rows if row["batch"] == name]
        lines += [f"## {name}, ‖g1‖ = {chosen[0]['gradient_norm']:.1f}", ""]
        cells = []
        for row in chosen:
            given = ", ".join(f"{key}={value!r}" for key, value in row["settings"].items())
            figures = ("" if row[key] is None else format(row[key], form) for key, form in columns.items())
            cells.append([row["passes"], f"`{given}`", *figures])
        lines += [*markdown_table(["passes", "settings", *(name.replace("_", " ") for name in columns)], cells), ""]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser("python -m benchmarks.precision", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--tokens", type=int, nargs="+", default=[80, 256], help="sizes of the batches")
    parser.add_argument("--kind", choices=["policy", "sharp", "text"], default="policy", help="of the batches")
    parser.add_argument("--output", type=Path, default=todays("precision"), help="path without suffix")
    arguments = parser.parse_args(argv)
    warnings.filterwarnings("ignore", "Gradient regularization: the self-check")  # it is a column of the table
    model = MODELS[arguments.model]()
    jitter_(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    start, rows = time.perf_counter(), []
    for size in arguments.tokens:
        rows += measure(model, make_batch(model, arguments.kind, size, seed=0))
    stamped = {**stamp(), "seconds": f"{time.perf_counter() - start:.0f}"}
    path: Path = arguments.output
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".md").write_text(markdown(rows, arguments.model, stamped), encoding="utf-8")
    path.with_suffix(".json").write_text(json.dumps({**stamped, "rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
