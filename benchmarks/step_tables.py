"""The tables of step_cost.py: its dated document, and the rows that the README has room for."""

from __future__ import annotations

from typing import Any

from peers import CANNOT_RUN, PEERS, described
from variants import OURS

__all__ = ["document", "for_readme", "table"]

Cells = dict[str, Any]
"""What step_cost.py found, by the name of the cell."""


def columns(cells: Cells) -> str:
    """The ratios to the floor of all cells in one table."""
    shown = {name for cell in cells.values() for name in cell["rows"]}
    names = [name for name in ("base", "floor", *OURS, *PEERS) if name in shown]
    lines = [f"| × floor | {' | '.join(cells)} |", "|---" * (1 + len(cells)) + "|"]
    for name in names:
        ratios = [f"{cell['rows'][name]['to_floor']:.3f}" if name in cell["rows"] else "–" for cell in cells.values()]
        lines.append(f"| {described(name)} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def table(cell: dict[str, Any]) -> str:
    """One cell with its spread."""
    lines = [
        "| variant | gradients | seconds per step | × floor | weight copies beyond base |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {described(name)} | {row['gradients']:.2f} "
        f"| {row['seconds']:.3f} ({row['seconds_low']:.3f} to {row['seconds_high']:.3f}) "
        f"| {row['to_floor']:.3f} ({row['to_floor_low']:.3f} to {row['to_floor_high']:.3f}) "
        f"| {row['copies_beyond_base']:.2f} |"
        for name, row in cell["rows"].items()
    ]
    return "\n".join(lines)


HOW = """Times: one step of each variant in turn; medians and quartiles over rounds, ratios taken within a round. Where only
each fourth step is regularized, both kinds of steps count by their share. All variants step the same weights with the same
AdamW state, one after the other in one process, whose allocator keeps freed memory, as CUDA's does (`keep_freed_memory` in
[measuring.py](../measuring.py) says why).

Memory: the highest point of all allocations in a step, beyond that of the base step, in copies of the weights, with whatever
a variant keeps from step to step; counted on one sequence a micro-batch, and two micro-batches where there are several. With
a single micro-batch the base step has no gradient yet when its activations are most, `memory="lean"` has the first one then:
so there its row lies between 1 and 2, and depends on the activations.

Where a SAM is faster: it takes g2 as it is. The combination of both gradients and the figures in `metrics` are one pass more
over memory, and the first norm is taken over all gradients, as theirs is. On a CPU a pass shows where tokens are few.

Random tokens and untrained weights: costs do not depend on values, as long as no clip engages; none does here."""


def document(cells: Cells) -> str:
    """All cells in one table, what to know about its rows, and each cell with its spread."""
    parts = ["# Cost of a regularized step", HOW, columns(cells), "Rows that need a word:", remarks(cells)]
    parts += ["Peers left out:", left_out(cells)]
    for name, cell in cells.items():
        parts += [f"## {name}", facts(cell), table(cell)]
    return "\n\n".join(parts) + "\n"


def remarks(cells: Cells) -> str:
    """What to know about rows that are shown."""
    shown = {name for cell in cells.values() for name in cell["rows"]}
    words = {name: peer.note for name, peer in PEERS.items() if peer.note and name in shown}
    words['GradRegOptimizer, memory="lean"'] = "float32 gradients only: refused in bf16"
    low = [cell["rows"]["GradRegOptimizer"] for cell in cells.values() if cell["settings"]["dtype"] == "bfloat16"]
    if low:
        copies = max(row["copies_beyond_base_first"] for row in low)
        words["GradRegOptimizer in bf16"] = (
            f"every 100th step checks the difference, with two more gradients and {copies:.1f} weight copies; not timed here"
        )
    return "\n".join(f"- {name}: {word}." for name, word in words.items())


def left_out(cells: Cells) -> str:
    """The peers without a row, each with the reason."""
    shown = {name for cell in cells.values() for name in cell["rows"]}
    reasons = {name: why for cell in cells.values() for name, why in cell["missing"].items() if name not in shown}
    return "\n".join(f"- {name}: {why}." for name, why in (reasons | CANNOT_RUN).items())


def facts(cell: dict[str, Any]) -> str:
    """What was measured, on what."""
    settings, stamped = cell["settings"], "; ".join(f"{key}: {fact}" for key, fact in cell["stamp"].items())
    return (
        f"{cell['parameters'] / 1e6:.1f} M parameters ({settings['layers']} layers, width {settings['width']}, vocabulary "
        f"{settings['vocabulary']}), {settings['accumulation']} micro-batch(es) of {settings['tokens']} tokens, "
        f"{settings['dtype']}; {cell['rounds']} rounds. {stamped}."
    )


def for_readme(cells: Cells) -> tuple[str, str]:
    """In words what was measured, and a table: of models smaller than the largest, steps of several micro-batches only."""
    size = max(cell["parameters"] for cell in cells.values())
    shown = [cell for cell in cells.values() if cell["parameters"] == size or cell["settings"]["accumulation"] > 1]
    single = next(cell for cell in shown if cell["parameters"] == size and cell["settings"]["dtype"] == "float32")
    several = [cell for cell in shown if cell["settings"]["accumulation"] > 1 and cell["settings"]["dtype"] == "float32"]
    memory = max(several or [single], key=lambda cell: cell["parameters"])
    rows = {
        "`GradRegOptimizer`": "GradRegOptimizer",
        '`memory="lean"`': 'GradRegOptimizer, memory="lean"',
        "`every=4`": "GradRegOptimizer, every=4",
        "`fraction=0.25`": "GradRegOptimizer, fraction=1/4",
    }
    peers = [name for name in single["rows"] if name in PEERS and PEERS[name].period == 1]
    everywhere = [name for name in peers if all(name in cell["rows"] for cell in shown)]
    if everywhere:
        fastest = min(everywhere, key=lambda name: single["rows"][name]["to_floor"])
        rows[f"of {len(peers)} peers: {fastest}"] = fastest
    titles = [_title(cell) for cell in shown]
    lines = [f"| × the floor | {' | '.join(titles)} | weight copies |", "|---" * (2 + len(shown)) + "|"]
    for words, name in rows.items():
        ratios = [f"{cell['rows'][name]['to_floor']:.3f}" if name in cell["rows"] else "–" for cell in shown]
        copies = memory["rows"].get(name) or single["rows"][name]
        lines.append(f"| {words} | {' | '.join(ratios)} | {copies['copies_beyond_base']:.1f} |")
    words = "Steps in multiples of the floor (two gradients and one AdamW step), and memory beyond the base step, on a CPU"
    return words, "\n".join(lines)


def _title(cell: dict[str, Any]) -> str:
    settings = cell["settings"]
    dtype = {"float32": "fp32", "bfloat16": "bf16"}[settings["dtype"]]
    return f"{cell['parameters'] / 1e6:.0f} M, {dtype}, {settings['accumulation']} × {settings['tokens']} tokens"
