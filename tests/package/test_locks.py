"""What `make lock` writes: whoever edits its inputs without it learns so here."""

from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
STACKS = sorted(str(path.relative_to(ROOT).with_suffix("")) for path in ROOT.glob("benchmarks/stacks/*.in"))


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


@pytest.mark.parametrize("name", STACKS)
def test_a_stack_has_what_its_list_says(name):
    """Each package in one exact version within the list's range, also those installed without what they require."""
    lines = (line.removeprefix("# --no-deps ") for line in (ROOT / f"{name}.in").read_text().splitlines())
    chosen = [Requirement(line) for line in lines if not line.startswith("#")]
    locked = pins(f"{name}.txt")
    assert all(pin.startswith("==") and "*" not in pin for pin in locked.values())
    for requirement in chosen:
        pin = locked[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin.removeprefix("==")), requirement.name


@pytest.mark.parametrize("name", ["constraints", "constraints-published", *STACKS])
def test_a_lock_fits_every_build_of_torch(name):
    """No package of a CUDA build, no label of one build, and no pip, which would replace itself."""
    locked = pins(f"{name}.txt")
    of_a_build = [package for package in locked if package.startswith(("nvidia", "cuda")) and package != "nvidia-ml-py"]
    assert not of_a_build
    assert "pip" not in locked
    assert not [pin for pin in locked.values() if "+" in pin]
