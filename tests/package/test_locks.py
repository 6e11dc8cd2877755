"""What `make lock` writes: whoever edits its inputs without it learns so here."""

from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


def pins(file):
    """The requirements of ``file`` that hold for this Python and system, by name."""
    lines = (line.partition(" #")[0].strip() for line in (ROOT / file).read_text().splitlines() if line[:1] not in ("#", ""))
    found = [
        requirement for requirement in map(Requirement, lines) if not requirement.marker or requirement.marker.evaluate()
    ]
    assert len({canonicalize_name(requirement.name) for requirement in found}) == len(found)
    return {canonicalize_name(requirement.name): str(requirement.specifier) for requirement in found}


@pytest.mark.parametrize("name", ["constraints", "constraints-published"])
def test_a_lock_follows_its_inputs(name):
    """Each package has one exact version: the chosen one, within the range that pyproject.toml allows."""
    chosen, locked = pins(f"{name}.in"), pins(f"{name}.txt")
    assert {package: locked.get(package) for package in chosen} == chosen
    assert all(pin.startswith("==") and "*" not in pin for pin in locked.values())
    extras = ("trl", "deepspeed", "demo", "bench", "docs", "dev")
    for requirement in map(Requirement, requires("gradreg_optim")):
        package = canonicalize_name(requirement.name)
        if package != "gradreg-optim" and any(
            requirement.marker is None or requirement.marker.evaluate({"extra": e}) for e in extras
        ):
            assert requirement.specifier.contains(locked[package].removeprefix("==")), package


@pytest.mark.parametrize("name", ["constraints", "constraints-published"])
def test_a_lock_fits_every_build_of_torch(name):
    """No package of a CUDA build, no label of one build, and no pip, which would replace itself."""
    locked = pins(f"{name}.txt")
    assert not [package for package in locked if package.startswith(("nvidia", "cuda")) or package == "pip"]
    assert not [pin for pin in locked.values() if "+" in pin]
