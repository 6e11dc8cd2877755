"""The document of gpu.py: goals, checks and costs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.common.tables import markdown_table
from benchmarks.cost.gpu_checks import GROUPS
from benchmarks.cost.gpu_cost import NEAREST, ON_GPU
from benchmarks.cost.peers import described

__all__ = ["document", "goals"]

Found = dict[str, Any]
OURS = "GradRegOptimizer"
LONG, SHORT, MIDDLE = "bf16, 4 × 8k", "bf16, 1 × 2k", "bf16, 1 × 8k"

HOW = """`base` is AdamW, fused. `floor` is two gradients and one such step, the least that a method with a second gradient
can cost. The model has the shape of Qwen2-0.5B and random weights; "4 × 8k" are four micro-batches of 8192 tokens, in
sequences of 2048. bf16: weights, gradients and AdamW's state are bf16. fp32: they are float32, under bf16 autocast. Each
variant takes one step in turn; ratios are taken within a round. In brackets: lower and upper quartile. Peak memory is that
of the usual step, and of the first one, which checks the precision in bf16, beyond that of the base step."""

BEYOND = """Measured without the passes: a closure hands over prepared gradients. A step of AdamW on such a gradient is
subtracted. Launches are kernels, copies and fills. "Busy" is the time for which they run; the rest is the time between
them. Bytes a parameter are what a copy on this device reads and writes in the busy time, so at least what the step moves."""


def goals(found: Found) -> Iterator[tuple[str, float, float | None]]:
    """What is aimed at, its bound, and the figure if it was measured."""

    def ratio(cell: str, name: str = OURS) -> float | None:
        return found["cells"].get(cell, {"rows": {}})["rows"].get(name, {}).get("to_floor")

    own = found["beyond"].get(f"{OURS}, bf16", {})
    yield "× floor, bf16, 4 × 8k tokens", 1.01, ratio(LONG)
    yield "× floor, bf16, 1 × 2k tokens", 1.04, ratio(SHORT)
    yield "launches beyond the passes, bf16", 60, own.get("launches")
    yield "bytes a parameter beyond the passes, bf16", 45, own.get("bytes_a_parameter")
    yield "× floor, `every=4`, bf16, 4 × 8k tokens", 0.63, ratio(LONG, f"{OURS}, every=4")
    yield "× floor, `fraction=1/4`, bf16, 4 × 8k tokens", 0.65, ratio(LONG, f"{OURS}, fraction=1/4")
    for cell in (SHORT, MIDDLE, LONG):
        peers = [value for name in ON_GPU if (value := ratio(cell, name)) is not None]
        if peers:
            yield f"× floor, {cell} tokens: ahead of the fastest peer", min(peers), ratio(cell)
    row = found["cells"].get(SHORT, {"rows": {}})["rows"].get(OURS, {})
    yield "weight copies beyond base, bf16, usual step", 2.0, row.get("copies_beyond_base")
    yield "weight copies beyond base, bf16, step of a check", 3.0, row.get("copies_beyond_base_first")


def document(found: Found) -> str:
    """Everything, the goals first."""
    parts = ["# The regularized step on a GPU", stamped(found)]
    parts += ["Toy sizes, to see that everything runs: the figures mean nothing."] if found["settings"]["quick"] else []
    parts += ["## Goals", goal_table(found)]
    parts += ["## Checks", check_table(found), "## Costs", HOW, ratio_table(found)]
    parts += [_lines("Left out:", found["missing"])] if found["missing"] else []
    parts += ["### Beyond the passes", BEYOND, beyond_table(found)] if found["beyond"] else []
    parts += ["### GRPO with generation", grpo_words(found["grpo"])] if found["grpo"] else []
    for name, cell in found["cells"].items():
        parts += [f"### {name} tokens, {cell['rounds']} rounds", cell_table(cell)]
    return "\n\n".join(parts) + "\n"


def stamped(found: Found) -> str:
    return "\n".join(f"- {key}: {fact}" for key, fact in found["stamp"].items())


def goal_table(found: Found) -> str:
    rows = []
    for name, bound, figure in goals(found):
        met = "not measured" if figure is None else "met" if figure <= bound else "**missed**"
        rows.append([name, f"≤ {bound:.4g}", "–" if figure is None else f"{figure:.4g}", met])
    return "\n".join(markdown_table(["goal", "bound", "figure", ""], rows))


def check_table(found: Found) -> str:
    marks = {"passed": "✓", "skipped": "skipped", "failed": "**failed**"}
    order = [*GROUPS, "costs"]  # groups run beside each other
    rows = [
        [check["group"], check["name"], marks[check["status"]], check["words"], f"{check['seconds']:.1f}"]
        for check in sorted(found["checks"], key=lambda check: order.index(check["group"]))
    ]
    return "\n".join(markdown_table(["group", "check", "", "found", "seconds"], rows))


def ratio_table(found: Found) -> str:
    """Times relative to two gradients and one step, all cells in one table."""
    cells = found["cells"]
    order = ("base", "floor", OURS, NEAREST, f"{OURS}, every=4", f"{OURS}, fraction=1/4", *ON_GPU)
    shown = [name for name in order if any(name in cell["rows"] for cell in cells.values())]
    rows = [["floor, ms", *(f"{1e3 * cell['rows']['floor']['seconds']:.1f}" for cell in cells.values())]]
    for name in shown:
        ratios = (cell["rows"].get(name, {}).get("to_floor") for cell in cells.values())
        rows.append([described(name), *("–" if ratio is None else f"{ratio:.3f}" for ratio in ratios)])
    return "\n".join(markdown_table(["× floor", *cells], rows))


def cell_table(cell: Found) -> str:
    """One cell, with quartiles and memory."""
    rows = [
        [
            described(name),
            f"{row['gradients']:.2f}",
            f"{1e3 * row['seconds']:.1f}",
            f"{row['to_floor']:.3f} ({row['to_floor_low']:.3f} to {row['to_floor_high']:.3f})",
            f"{row['copies_beyond_base']:.2f}",
            f"{row['copies_beyond_base_first']:.2f}",
            f"{max(cell['peaks'][name].values()) / cell['parameters']:.1f}",
        ]
        for name, row in cell["rows"].items()
    ]
    head = ["variant", "gradients", "ms", "× floor", "weight copies beyond base", "first step", "peak bytes a parameter"]
    return "\n".join(markdown_table(head, rows))


def beyond_table(found: Found) -> str:
    rows = [
        [
            name,
            str(row["launches"]),
            f"{row['milliseconds']:.2f}",
            f"{row['busy_milliseconds']:.2f}",
            f"{row['bytes_a_parameter']:.1f}",
        ]
        for name, row in found["beyond"].items()
    ]
    return "\n".join(markdown_table(["step", "launches", "ms", "busy, ms", "bytes a parameter"], rows))


def grpo_words(row: Found) -> str:
    return (
        f"{row['parameters'] / 1e6:.0f} M parameters in bf16, {row['completions']} completions of {row['tokens']} tokens, "
        f"generated by Transformers under TRL. A regularized step takes {row['regularized']:.2f} s, one without penalty "
        f"{row['plain']:.2f} s: {row['ratio']:.2f} ×. Every other step is regularized; medians of {len(row['seconds']) - 2} "
        "steps."
    )


def _lines(title: str, reasons: dict[str, str]) -> str:
    return "\n".join([title, "", *(f"- {name}: {reason}." for name, reason in reasons.items())])
