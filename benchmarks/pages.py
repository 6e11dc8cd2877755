"""Write the parts of README.md and docs/ that are made of results, from the newest result of each benchmark.

    python -m benchmarks.pages

Each part stands between a line ``<!-- name -->`` and a line ``<!-- end -->``. The long benchmarks of cost and
trainers write all parts when they end. The tests compare the pages with the results.
"""

from __future__ import annotations

import argparse
import json
import posixpath
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.common.results import RESULTS, ROOT, between_marks, newest
from benchmarks.common.tables import markdown_table
from benchmarks.cost import step_tables, zero_cost
from benchmarks.cost.variants import NAME
from benchmarks.stacks.__main__ import table as stacks_table
from benchmarks.trainers.tables import summary as trainers_summary

__all__ = ["PARTS", "Results", "write", "written"]


class Results:
    """The newest results, for a page that links to them; ``page`` is its path in the repository."""

    def __init__(self, page: str, folder: Path = RESULTS) -> None:
        self.page, self.folder = page, folder

    def __getitem__(self, question: str) -> Any:
        """The figures about a question."""
        return json.loads(newest(question, self.folder).read_text(encoding="utf-8"))

    def link(self, question: str, file: str = "result.json") -> str:
        """The address of the document about a question, from the page."""
        document = f"benchmarks/results/{newest(question, self.folder, file).parent.name}/result.md"
        return posixpath.relpath(document, posixpath.dirname(self.page) or ".")


def cost_in_short(results: Results) -> str:
    """A few lines about cost, in plain steps, from a GPU if there is a result."""
    try:
        question, cells = "gpu-cost", [part for part in results["gpu-cost"].values() if "rows" in part]
        hardware = cells[0]["stamp"]["hardware"].partition(",")[0]
    except FileNotFoundError:
        question, cells, hardware = "step-cost", list(results["step-cost"].values()), "CPUs"

    def times(variant: str) -> str:
        rows = [cell["rows"] for cell in cells if variant in cell["rows"]]
        ratios = [row[variant]["to_floor"] / row["base"]["to_floor"] for row in rows]
        return f"{min(ratios):.2f} to {max(ratios):.2f}"

    (generating,) = (row for row in results["below-two"]["cost"]["figures"] if row["kind"] == "GRPO")
    whole = generating["rows"]["all"]["whole step"]["ratio"][1]
    copies = max(cell["rows"][NAME]["copies_beyond_base"] for cell in cells)
    seldom = times(f"{NAME}, every=4")
    return f"""- **Time**: a regularized step takes {times(NAME)} plain steps, with `every=4` {seldom}.
  In GRPO, where a step also generates, it took {whole:.2f}.
- **Memory**: {copies:.1f} copies of the weights; under ZeRO one partition of one gradient.
- Measured on {hardware} ([figures]({results.link(question)}), [more about cost](docs/cost.md))."""


def cost(results: Results) -> str:
    """The table of times and memory, and what ZeRO costs."""
    under_zero = zero_cost.in_words(results["zero-cost"]["rows"])
    return f"""{step_tables.in_plain_steps(results["step-cost"])}

All figures are from two CPU cores: [all variants]({results.link("step-cost")}),
[growth with tokens, sizes and ranks]({results.link("scale-cost")}).
Under ZeRO on two ranks a step takes {under_zero} two gradients and one step of the engine
([all stages]({results.link("zero-cost")}))."""


def trainers(results: Results) -> str:
    """The trainers that were tested, one row for each version of TRL."""
    return trainers_summary(results["trainers"]["runs"], results.link("trainers"))


def stacks(results: Results) -> str:
    """The training stacks that were tried."""
    lines = stacks_table(results["stacks"]["stacks"])
    return "\n".join([*lines, "", f"[How]({results.link('stacks')})"])


def precision(results: Results) -> str:
    """Cosines with H·g1 by setting and arithmetic: the median over batches, and the worst."""
    cells: dict[str, dict[str, list[float]]] = {}
    rows = results["precision"]["rows"]
    for row in rows:
        given = ", ".join(
            f"{name}={value!r}" for name, value in row["settings"].items() if name != "check_every"
        )
        cells.setdefault(given.replace("'", '"'), {}).setdefault(row["passes"], []).append(row["cosine"])
    passes = list(dict.fromkeys(row["passes"] for row in rows))
    shown = [
        [
            f"`{given}`",
            *(f"{median(of[name]):.2f} ({min(of[name]):.2f})" if name in of else "–" for name in passes),
        ]
        for given, of in cells.items()
    ]
    batches = len({row["batch"] for row in rows})
    link = results.link("precision")
    words = f"Median and, in brackets, the worst of up to {batches} batches ([all figures]({link}))."
    return "\n".join([*markdown_table(["settings", *passes], shown), "", words])


def mean_of(values: Iterable[float]) -> dict[str, Any]:
    """Mean and 95% bootstrap interval."""
    from benchmarks.hacking.summary import interval as bootstrapped  # needs scipy, which not every page does

    return bootstrapped(list(values))


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
            rows.append(
                [
                    in_words(name),
                    interval(row["figures"]["final"], ".2f"),
                    interval(gain, "+.2f") if gain else "–",
                ]
            )
        seeds = len(summary[baseline]["seeds"])
        head = ["method", f"final gold, {seeds} seeds", f"over {in_words(baseline)}"]
        return "\n".join([*markdown_table(head, rows), "", f"[All figures]({results.link(question)})"])

    return table


def in_words(arm: str) -> str:
    """The name of an arm for readers who do not know the study's own.

    >>> in_words("gr-sequence-0.3"), in_words("kl-0.1-rate-0.5"), in_words("early stopping")
    ('GR sequence, γ = 0.3', 'KL penalty, β = 0.1, half the rate', 'early stopping')
    >>> in_words("kl-0.3-gr-sequence-1")
    'KL penalty, β = 0.3, and GR sequence, γ = 1'
    """
    whole = {"none": "no penalty", "GR eps": "GR published", "GR radius": "GR published, by radius"}
    rates = {"0.5": "half the rate", "0.25": "a quarter of the rate"}
    kinds = {
        r"-?kl-([\d.]+)": "KL penalty, β = {}",
        r"-?gr-eps-([\d.]+)": "GR published, γ = {}",
        r"-?gr-(sequence|importance)-([\d.]+)": "GR {}, γ = {}",
        r"-?rate-([\d.]+)": "{}",
        r"-previous": "along the gradient of the step before",
    }
    words, rest = [], arm
    while rest and arm not in whole:
        found = next(((m, text) for pattern, text in kinds.items() if (m := re.match(pattern, rest))), None)
        if found is None:
            return arm
        match, text = found
        words.append(
            text.format(*(rates.get(part, part) if "rate" in match[0] else part for part in match.groups()))
        )
        rest = rest[match.end() :]
    return whole.get(arm, ", ".join(words).replace(", GR", ", and GR"))


def compared(question: str, file: str, baseline: str, **where: Any) -> Callable[[Results], str]:
    """Gold at the end of the arms in a file of runs, best first, and the gain over one of them, paired by
    seed.

    Of the runs those with the values of ``where`` count. ``baseline`` is the arm's name or, for a study that
    tunes it, what the name begins with.
    """

    def table(results: Results) -> str:
        ends: dict[str, dict[int, float]] = {}
        for one in map(
            json.loads, newest(question, results.folder, file).read_text(encoding="utf-8").splitlines()
        ):
            if where.items() <= one.items() and one.get("stage") != "tuning":
                name = one["arm"] if isinstance(one["arm"], str) else one["arm"]["name"]
                ends.setdefault(spelled_out(name), {})[one["seed"]] = one["curve"][-1]["gold"]
        if not ends:
            raise FileNotFoundError(f"{question}/{file} has no runs with {where}")
        whole = max(map(len, ends.values()))
        # A study may still be running.
        ends = {name: gold for name, gold in ends.items() if len(gold) == whole}
        alike = [name for name in ends if name.startswith(baseline) and "-gr-" not in name]
        base = baseline if baseline in ends else alike[0]
        rows = []
        for name, gold in sorted(ends.items(), key=lambda item: -fmean(item[1].values())):
            gains = [gold[seed] - ends[base][seed] for seed in sorted(gold.keys() & ends[base].keys())]
            gain = "–" if name == base else interval(mean_of(gains), "+.3f")
            rows.append([in_words(name), str(len(gold)), interval(mean_of(gold.values()), ".3f"), gain])
        head = ["method", "seeds", "final gold", f"over {in_words(base)}"]
        return "\n".join([*markdown_table(head, rows), "", f"[All figures]({results.link(question, file)})"])

    return table


def spelled_out(arm: str) -> str:
    """The name of an arm in the files of 2026-11-26, as the study itself has it.

    >>> spelled_out("klseq:0.3:1"), spelled_out("gr:3"), spelled_out("klrate:0.3:0.5"), spelled_out("kl-0.2")
    ('kl-0.3-gr-sequence-1', 'gr-eps-3', 'kl-0.3-rate-0.5', 'kl-0.2')
    """
    kinds = {"seq": "gr-sequence", "gr": "gr-eps", "rate": "rate", "kl": "kl", "seqprev": "gr-sequence"}
    kind, *values = arm.split(":")
    if not values:
        return arm
    if len(values) == 2:
        return f"kl-{values[0]}-{kinds[kind.removeprefix('kl')]}-{values[1]}"
    return f"{kinds[kind]}-{values[0]}" + ("-previous" if kind == "seqprev" else "")


def below_two(results: Results) -> str:
    """What cheaper variants lose in the reward-hacking study."""
    found = results["below-two"]["hacking"]["figures"]
    names = {
        "every-4-plain-4": "`every=4` and 4γ",
        "every-4-plain": "`every=4` and γ",
    }
    rows = [[words, interval(found[name]["gain"]["whole"], "+.2f")] for name, words in names.items()]
    table = markdown_table(["setting", "final gold over the full penalty"], rows)
    return "\n".join([*table, "", f"[All figures]({results.link('below-two')})"])


def with_kl(problem: str, *, answers: int = 64, steps: int = 120) -> Callable[[Results], str]:
    """A KL penalty, and GR on top of it, both tuned."""
    return compared("kl-and-gr", "result.jsonl", "kl-", problem=problem, answers=answers, steps=steps)


PARTS: dict[str, dict[str, Callable[[Results], str]]] = {
    "README.md": {"cost": cost_in_short},
    "docs/cost.md": {"cost": cost, "below-two": below_two},
    "docs/trainers.md": {"trainers": trainers},
    "docs/stacks.md": {"stacks": stacks},
    "docs/precision.md": {"precision": precision},
    "docs/which-method.md": {
        "learned": gold("reward-hacking", "With the learning rate tuned", "KL penalty"),
        "loophole": gold("reward-hacking-loophole", "Settings as given", "kl-0.3"),
        "learned-with-kl": with_kl("learned"),
        "loophole-with-kl": with_kl("loophole"),
        "judge-with-kl": with_kl("judge"),
        "learned-longer": with_kl("learned", steps=240),
        "loophole-longer": with_kl("loophole", steps=240),
        "judge-longer": with_kl("judge", steps=240),
        "learned-wider": with_kl("learned", answers=256),
        "loophole-wider": with_kl("loophole", answers=256),
        "learned-untuned": compared("kl-and-gr-untuned", "learned.jsonl", "kl-0.3"),
        "larger": compared("reward-hacking-1024", "result.jsonl", "kl-0.3"),
    },
}
"""By page and name of the part."""


def written(page: str, text: str, results: Path = RESULTS) -> str:
    """``text`` of the page with its parts made anew; one without a result stays as it is."""
    for name, part in PARTS[page].items():
        with suppress(FileNotFoundError):
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
