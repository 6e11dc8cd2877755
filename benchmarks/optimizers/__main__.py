"""Which optimizers work inside the wrapper? Runs their tests and writes the table of docs/optimizers.md.

    make optimizers

Runs tests/wrapping/test_optimizers.py in this environment. An optimizer whose package is not installed is listed as such.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from datetime import date
from importlib.metadata import packages_distributions, version
from pathlib import Path
from xml.etree import ElementTree

import torch

from benchmarks.common.results import ROOT
from benchmarks.common.tables import markdown_table

PAGE = ROOT / "docs" / "optimizers.md"
TEST = "tests/wrapping/test_optimizers.py"
HEAD = """# Optimizers

<!-- written by `make optimizers` -->

Any `torch.optim.Optimizer` that steps on gradients when it is called can be wrapped. The wrapper shares its groups,
its state and its state dict.

Refused when the wrapper is built, each with the reason: optimizers whose `step` needs a closure of its own (LBFGS,
AliG, SAM), and those that step in the backward (LOMO, AdaLomo, layerwise GaLore and APOLLO, gradient release).
Optimizers that differentiate the gradient again (AdaHessian, SophiaH) need a graph that the combined gradient does
not have."""
LEGEND = """Each takes two regularized steps (γ = ε = 0.1, float32) on a network with a matrix of 4096 elements, the
smallest for which 8-bit and 4-bit states are kept. ✓ in the column *steps*: it stepped on the gradient of the
formula, computed in float64, and moved bit for bit as the bare optimizer does on this gradient. *Distance* is how far
its weights then are from those of the bare optimizer on the float64 gradient. It is large where an optimizer
amplifies rounding: eigenvectors, orthogonalization in bfloat16. ✓ in the column *state dict*: saved and loaded into a
new optimizer, it takes the same third step, bit for bit. – there: the bare optimizer does not."""


def run() -> list[ElementTree.Element]:
    """The results of the tests."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", TEST, f"--junitxml={report}", "-p", "no:cacheprovider"]
        subprocess.run(command, cwd=ROOT, env=environment, check=False, stdout=sys.stderr)
        return list(ElementTree.parse(report).iter("testcase"))


def rows(cases: list[ElementTree.Element]) -> list[list[str]]:
    """One row for each optimizer: package, name, outcome of both tests, and the distance of the weights."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for case in cases:
        matched = re.fullmatch(r"(\w+)\[(.+)\]", case.get("name", ""))
        if matched is None:
            continue
        of_kind = found[matched[2]]
        skipped = case.find("skipped")
        failed = case.find("failure") is not None or case.find("error") is not None
        missing = skipped is not None and "not installed" in (skipped.get("message") or "")
        of_kind[matched[1]] = "**fails**" if failed else "not installed" if missing else "–" if skipped is not None else "✓"
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
    argparse.ArgumentParser("python -m benchmarks.optimizers", description=__doc__.splitlines()[0]).parse_args(argv)
    table = rows(run())
    commit = subprocess.check_output(["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True).strip()
    origin = f"{date.today()}, commit {commit}, Python {platform.python_version()}, torch {torch.__version__}, on CPU."
    lines = markdown_table(["package", "optimizer", "steps", "distance", "state dict"], table)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text("\n\n".join([HEAD, LEGEND, "\n".join(lines), origin]) + "\n", encoding="utf-8")
    print("\n".join(lines))
    if any("fails" in cell for row in table for cell in row):
        sys.exit("Some optimizer fails.")


if __name__ == "__main__":
    main(sys.argv[1:])
