"""Write the parts of README.md and docs/ that are made of results, from the newest result of each benchmark.

    python -m benchmarks.pages

Each part stands between a line ``<!-- name -->`` and a line ``<!-- end -->``. Benchmarks whose figures are shown there run this
when they end. The tests compare the pages with the results.
"""

from __future__ import annotations

import argparse
import json
import posixpath
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.common.results import RESULTS, ROOT, between_marks, newest
from benchmarks.common.tables import markdown_table
from benchmarks.cost import step_tables, zero_cost

__all__ = ["PARTS", "Results", "write", "written"]

OURS = "GradRegOptimizer"


class Results:
    """The newest results, for a page that links to them; ``page`` is its path from the root of the repository."""

    def __init__(self, page: str, folder: Path = RESULTS) -> None:
        self.page, self.folder = page, folder

    def __getitem__(self, question: str) -> Any:
        """The figures about a question."""
        return json.loads(newest(question, self.folder).read_text(encoding="utf-8"))

    def link(self, question: str) -> str:
        """The address of the document about a question, from the page."""
        document = f"benchmarks/results/{newest(question, self.folder).parent.name}/result.md"
        return posixpath.relpath(document, posixpath.dirname(self.page) or ".")


def cost_in_short(results: Results) -> str:
    """A few lines about cost, in plain steps, from a GPU if there is a result."""
    try:
        question, found = "gpu-cost", results["gpu-cost"]
        cells, hardware = list(found["cells"].values()), found["stamp"]["hardware"].partition(",")[0]
    except FileNotFoundError:
        question, cells, hardware = "step-cost", list(results["step-cost"].values()), "CPUs"

    def times(variant: str) -> str:
        rows = [cell["rows"] for cell in cells if variant in cell["rows"]]
        ratios = [row[variant]["to_floor"] / row["base"]["to_floor"] for row in rows]
        return f"{min(ratios):.2f} to {max(ratios):.2f}"

    (generating,) = (row for row in results["below-two"]["cost"]["figures"] if row["kind"] == "GRPO")
    whole, quarter = (generating["rows"][name]["whole step"]["ratio"][1] for name in ("all", "fraction=1/4"))
    copies = max(cell["rows"][OURS]["copies_beyond_base"] for cell in cells)
    return f"""- **Time**: a regularized step takes {times(OURS)} plain steps; with `every=4` {times(f"{OURS}, every=4")}, with
  `fraction=0.25` {times(f"{OURS}, fraction=1/4")}. In GRPO, where steps also generate, {whole:.2f} and, with `fraction=0.25`, {quarter:.2f}.
- **Memory**: {copies:.1f} copies of the weights; under ZeRO one partition of one gradient.
- Measured on {hardware} ([figures]({results.link(question)}), [more about cost](docs/cost.md))."""


def cost(results: Results) -> str:
    """The table of times and memory, and what ZeRO costs."""
    return f"""{step_tables.in_plain_steps(results["step-cost"])}

All figures are from two CPU cores: [all variants]({results.link("step-cost")}), [growth with tokens, sizes and
ranks]({results.link("scale-cost")}). Under ZeRO on two ranks a step takes {zero_cost.for_readme(results["zero-cost"]["rows"])}
two gradients and one step of the engine ([all stages]({results.link("zero-cost")}))."""


def trainers(results: Results) -> str:
    """The trainers that were tested, one row for each version of TRL."""
    matrix = import_module("benchmarks.trainers.__main__")  # which writes pages
    return str(matrix.summary(results["trainers"]["runs"], results.link("trainers")))


def precision(results: Results) -> str:
    """Cosines, and self-checks in brackets, one column for each batch."""
    rows = results["precision"]["rows"]
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        given = ", ".join(f"{key}={value!r}" for key, value in row["settings"].items()).replace("'", '"')
        check = "" if row["self_check"] is None else f" ({row['self_check']:.2f})"
        cells.setdefault((row["passes"], f"`{given}`" if given else "defaults"), {})[row["batch"]] = f"{row['cosine']:.2f}{check}"
    lines = [[*key, *(found.get(batch, "–") for batch in batches)] for key, found in cells.items()]
    table = markdown_table(["passes", "settings", *(f"{batch.split('-')[1]} tokens" for batch in batches)], lines)
    return "\n".join([*table, "", f"[All figures]({results.link('precision')})"])


def interval(found: dict[str, Any], form: str) -> str:
    """A mean with its 95% interval."""
    return f"{found['mean']:{form}} ({found['low']:{form}} to {found['high']:{form}})".replace("-", "−")


def gold(question: str, part: str, baseline: str) -> Callable[[Results], str]:
    """The final gold of all arms in a part of a study, best first, and the gain over one of them."""

    def table(results: Results) -> str:
        summary = results[question]["summary"][part]
        rows = []
        for name, row in sorted(summary.items(), key=lambda item: -item[1]["figures"]["final"]["mean"]):
            gain = row["gain"].get(f"final over {baseline}")
            rows.append([in_words(name), interval(row["figures"]["final"], ".2f"), interval(gain, "+.2f") if gain else "–"])
        seeds = len(summary[baseline]["seeds"])
        head = ["method", f"final gold, {seeds} seeds", f"over {in_words(baseline)}"]
        return "\n".join([*markdown_table(head, rows), "", f"[All figures]({results.link(question)})"])

    return table


def in_words(arm: str) -> str:
    """The name of an arm for readers who do not know the study's own.

    >>> in_words("gr-sequence-0.3"), in_words("kl-0.1"), in_words("rate-0.25"), in_words("early stopping")
    ('GR sequence, γ = 0.3', 'KL penalty, β = 0.1', 'learning rate × 0.25', 'early stopping')
    """
    kinds = {
        "gr-eps": "GR published, γ =",
        "gr-sequence": "GR sequence, γ =",
        "gr-importance": "GR importance, γ =",
        "kl": "KL penalty, β =",
        "rate": "learning rate ×",
    }
    found = re.fullmatch(r"(\D+)-([\d.]+)(-previous)?", arm)
    if found is None or found[1] not in kinds:
        return {"none": "no penalty", "GR eps": "GR published", "GR radius": "GR published, by radius"}.get(arm, arm)
    return f"{kinds[found[1]]} {found[2]}" + (", along the gradient of the step before" if found[3] else "")


def below_two(results: Results) -> str:
    """What cheaper variants lose in the reward-hacking study."""
    found = results["below-two"]["hacking"]["figures"]
    names = {
        "fraction-0.5": "`fraction=0.5`",
        "fraction-0.25": "`fraction=0.25`",
        "every-4-plain-4": "`every=4` and 4γ",
        "every-4-plain": "`every=4` and γ",
    }
    rows = [[words, interval(found[name]["gain"]["whole"], "+.2f")] for name, words in names.items()]
    table = markdown_table(["setting", "final gold over the full penalty"], rows)
    return "\n".join([*table, "", f"[All figures]({results.link('below-two')})"])


PARTS: dict[str, dict[str, Callable[[Results], str]]] = {
    "README.md": {"cost": cost_in_short},
    "docs/cost.md": {"cost": cost, "below-two": below_two},
    "docs/trainers.md": {"trainers": trainers},
    "docs/precision.md": {"precision": precision},
    "docs/which-method.md": {
        "learned": gold("reward-hacking", "With the learning rate tuned", "KL penalty"),
        "loophole": gold("reward-hacking-loophole", "Settings as given", "kl-0.3"),
        "judge": gold("reward-hacking-judge", "Settings as given", "kl-0.3"),
    },
}
"""By page and name of the part."""


def written(page: str, text: str, results: Path = RESULTS) -> str:
    """``text`` of the page with its parts made anew."""
    for name, part in PARTS[page].items():
        text = between_marks(text, name, part(Results(page, results)))
    return text


def write(root: Path = ROOT, results: Path = RESULTS) -> None:
    """Write every part of every page."""
    for page in PARTS:
        file = root / page
        file.write_text(written(page, file.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    argparse.ArgumentParser("python -m benchmarks.pages", description=__doc__.splitlines()[0]).parse_args()
    write()
