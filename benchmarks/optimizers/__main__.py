"""Which optimizers work inside the wrapper? Runs their tests and writes the table of docs/optimizers.md.

    make optimizers

Runs tests/wrapping/test_optimizers.py in this environment. An optimizer whose package is not installed is
listed as such.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
from collections import defaultdict
from importlib.metadata import packages_distributions, version
from xml.etree import ElementTree

from benchmarks.common.results import ROOT, stamp
from benchmarks.common.tables import markdown_table
from benchmarks.common.testing import cases_of, outcome_of

PAGE = ROOT / "docs" / "optimizers.md"
TEST = "tests/wrapping/test_optimizers.py"
HEAD = """# Optimizers

<!-- written by `make optimizers` -->

Any `torch.optim.Optimizer` that steps on gradients when it is called can be wrapped. The wrapper shares its
groups, its state and its state dict.

Refused when the wrapper is built, each with the reason: optimizers whose `step` needs a closure of its own
(LBFGS, AliG, SAM), and those that step in the backward (LOMO, AdaLomo, layerwise GaLore and APOLLO, gradient
release). Optimizers that differentiate the gradient again (AdaHessian, SophiaH) need a graph that the
combined gradient does not have."""
LEGEND = """Each takes two regularized steps (γ = ε = 0.1, float32) on a network with a matrix of 4096
elements, the smallest for which 8-bit and 4-bit states are kept. ✓ in the column *steps*: it stepped on the
gradient of the formula, computed in float64, and moved bit for bit as the bare optimizer does on this
gradient. *Distance* is how far its weights then are from those of the bare optimizer on the float64 gradient.
It is large where an optimizer amplifies rounding: eigenvectors, orthogonalization in bfloat16. ✓ in the
column *state dict*: saved and loaded into a new optimizer, it takes the same third step, bit for bit. –
there: the bare optimizer does not."""


def rows(cases: list[ElementTree.Element]) -> list[list[str]]:
    """One row for each optimizer: package, name, outcome of both tests, and the distance of the weights."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for case in cases:
        matched = re.fullmatch(r"(\w+)\[(.+)\]", case.get("name", ""))
        if matched is None:
            continue
        of_kind = found[matched[2]]
        skipped, mark = (
            case.find("skipped"),
            {"failed": "**fails**", "skipped": "–", "passed": "✓"}[outcome_of(case)],
        )
        is_missing = skipped is not None and "not installed" in (skipped.get("message") or "")
        of_kind[matched[1]] = "not installed" if is_missing else mark
        for entry in case.iter("property"):
            of_kind["distance"] = f"{float(entry.get('value', '')):.0e}"
    return [
        [
            package_of(path.split(".")[0]),
            path.rpartition(".")[2],
            of_kind.get("test_two_steps_follow_the_formula", ""),
            of_kind.get("distance", "").replace("0e+00", "0"),
            of_kind.get("test_a_state_dict_continues", ""),
        ]
        for path, of_kind in found.items()
    ]


@functools.cache
def package_of(module: str) -> str:
    """The distribution that has a module, with its version."""
    names = packages_distributions().get(module)
    return f"{names[0]} {version(names[0]).partition('+')[0]}" if names else module


def main(argv: list[str]) -> None:
    """Run the tests and write the page.

    Raises:
        SystemExit: an optimizer fails.
    """
    argparse.ArgumentParser(
        "python -m benchmarks.optimizers", description=__doc__.splitlines()[0]
    ).parse_args(argv)
    table = rows(cases_of(sys.executable, TEST))
    made = stamp()
    origin = f"{made['date']}, commit {made['commit']}, {made['versions']}, on CPU."
    lines = markdown_table(["package", "optimizer", "steps", "distance", "state dict"], table)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text("\n\n".join([HEAD, LEGEND, "\n".join(lines), origin]) + "\n", encoding="utf-8")
    print("\n".join(lines))
    if any("fails" in cell for row in table for cell in row):
        sys.exit("Some optimizer fails.")


if __name__ == "__main__":
    main(sys.argv[1:])
