"""The tables of step_cost: its document, and a few rows in plain steps."""

from __future__ import annotations

from typing import Any

from benchmarks.common.tables import markdown_table
from benchmarks.cost.peers import CANNOT_RUN, PEERS, described
from benchmarks.cost.variants import NAME

__all__ = ["columns", "document", "in_plain_steps", "table"]

Cells = dict[str, Any]
"""The results of step_cost, by the name of the cell."""

HOW = """`base` is AdamW. `floor` is two gradients and one AdamW step, the least that a method with a second
gradient can cost; "× floor" is the time of a step relative to it.

Times: each variant takes one step in turn; medians and quartiles over rounds, with ratios taken within a
round. Where only every fourth step is regularized, the two kinds of steps are weighted by their frequency.
All variants step the same weights with the same AdamW state, one after the other in one process. Its
allocator keeps freed memory, as CUDA's does; `keep_freed_memory` in [measuring.py](../../cost/measuring.py)
gives the reason.

Memory: the peak of all allocations in a step, beyond that of the base step, in copies of the weights,
including what a variant keeps between steps. It is counted with one sequence in a micro-batch, and with two
micro-batches where there are several.

Some SAM implementations are faster because they use g2 as it is. Combining both gradients and computing the
figures in `metrics` takes one more pass over memory. On a CPU that pass is noticeable when a step has few
tokens.

Tokens are random and weights untrained. Costs do not depend on values unless a clip engages, and none does
here."""


def columns(cells: Cells) -> str:
    """Times relative to two gradients and one step, all cells in one table."""
    names = dict.fromkeys(name for cell in cells.values() for name in cell["rows"])
    rows = [[described(name), *(_ratio(cell, name) for cell in cells.values())] for name in names]
    return "\n".join(markdown_table(["× floor", *cells], rows))


def table(cell: dict[str, Any]) -> str:
    """One cell, with quartiles."""
    rows = [
        [
            described(name),
            f"{row['gradients']:.2f}",
            f"{row['seconds']:.3f} ({row['seconds_low']:.3f} to {row['seconds_high']:.3f})",
            f"{row['to_floor']:.3f} ({row['to_floor_low']:.3f} to {row['to_floor_high']:.3f})",
            f"{row['copies_beyond_base']:.2f}",
            f"{row['copies_beyond_base_first']:.2f}",
        ]
        for name, row in cell["rows"].items()
    ]
    head = ["variant", "gradients", "seconds per step", "× floor", "weight copies beyond base", "first step"]
    return "\n".join(markdown_table(head, rows))


def document(cells: Cells) -> str:
    """All cells in one table, notes about its rows, and each cell with quartiles."""
    parts = ["# Cost of a regularized step", HOW, columns(cells), "Notes:", remarks(cells)]
    parts += ["Not measured:", left_out(cells)]
    for name, cell in cells.items():
        parts += [f"## {name}", facts(cell), table(cell)]
    return "\n\n".join(parts) + "\n"


def remarks(cells: Cells) -> str:
    """Notes about the rows."""
    shown = {name for cell in cells.values() for name in cell["rows"]}
    words = {name: peer.note for name, peer in PEERS.items() if peer.note and name in shown}
    half = [cell for cell in cells.values() if cell["settings"]["dtype"] == "bfloat16"]
    low = [cell["rows"][NAME] for cell in half]
    if low:
        copies = max(row["copies_beyond_base_first"] for row in low)
        words["GradRegOptimizer in bf16"] = (
            f"every 100th step checks the difference, with two more gradients and {copies:.1f} weight "
            "copies; not timed here"
        )
    return "\n".join(f"- {name}: {word}." for name, word in words.items())


def left_out(cells: Cells) -> str:
    """The optimizers without a row, each with the reason."""
    shown = {name for cell in cells.values() for name in cell["rows"]}
    every = {name: why for cell in cells.values() for name, why in cell["missing"].items()}
    reasons = {name: why for name, why in every.items() if name not in shown}
    return "\n".join(f"- {name}: {why}." for name, why in (reasons | CANNOT_RUN).items())


def facts(cell: dict[str, Any]) -> str:
    """The cell's model and batch, and its stamp."""
    settings, stamped = cell["settings"], "; ".join(f"{key}: {fact}" for key, fact in cell["stamp"].items())
    return (
        f"{cell['parameters'] / 1e6:.1f} M parameters ({settings['layers']} layers, width "
        f"{settings['width']}, vocabulary {settings['vocabulary']}), {settings['accumulation']} × "
        f"{settings['tokens']} tokens, {settings['dtype']}; {cell['rounds']} rounds. {stamped}."
    )


def in_plain_steps(cells: Cells) -> str:
    """Times in steps of AdamW. Of smaller models only steps of several micro-batches are shown."""
    size = max(cell["parameters"] for cell in cells.values())
    several = [cell for cell in cells.values() if cell["settings"]["accumulation"] > 1]
    shown = [cell for cell in cells.values() if cell["parameters"] == size or cell in several]
    full = [cell for cell in shown if cell["settings"]["dtype"] == "float32"]
    single = next(cell for cell in full if cell["parameters"] == size)
    memory = max([cell for cell in full if cell in several] or [single], key=lambda cell: cell["parameters"])
    names = {
        "two gradients and one step": "floor",
        "`GradRegOptimizer`": NAME,
        "`every=4`": f"{NAME}, every=4",
    }
    peers = [name for name in single["rows"] if name in PEERS and PEERS[name].period == 1]
    everywhere = [name for name in peers if all(name in cell["rows"] for cell in shown)]
    if everywhere:
        fastest = min(everywhere, key=lambda name: single["rows"][name]["to_floor"])
        names[f"the fastest of {len(peers)} other optimizers: {fastest}"] = fastest
    rows = []
    for words, name in names.items():
        copies = memory["rows"].get(name) or single["rows"][name]
        times = (_plain_steps(cell, name) for cell in shown)
        rows.append([words, *times, f"{copies['copies_beyond_base']:.1f}"])
    head = ["plain steps", *map(_title, shown), "weight copies beyond a plain step"]
    return "\n".join(markdown_table(head, rows))


def _plain_steps(cell: dict[str, Any], name: str) -> str:
    rows = cell["rows"]
    return f"{rows[name]['to_floor'] / rows['base']['to_floor']:.2f}" if name in rows else "–"


def _ratio(cell: dict[str, Any], name: str) -> str:
    return f"{cell['rows'][name]['to_floor']:.3f}" if name in cell["rows"] else "–"


def _title(cell: dict[str, Any]) -> str:
    settings = cell["settings"]
    dtype = {"float32": "fp32", "bfloat16": "bf16"}[settings["dtype"]]
    tokens = f"{settings['accumulation']} × {settings['tokens']} tokens"
    return f"{cell['parameters'] / 1e6:.0f} M, {dtype}, {tokens}"
