"""The ranges of versions that the extras declare, and what is said at import about a version outside them."""

import importlib
import importlib.metadata
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import gradreg_optim.versions

EXTRAS = Path(__file__).parents[2] / "pyproject.toml"
CHECKED = ("accelerate", "deepspeed", "transformers", "trl")
real_requires, real_version = importlib.metadata.requires, importlib.metadata.version


def installed(name):
    try:
        return real_version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@pytest.fixture
def pretend(monkeypatch):
    """Lets metadata say that the package requires those lines, and that those versions are installed."""

    def pretend(lines, **versions):
        def version(name):
            return versions[name] if name in versions else real_version(name)

        monkeypatch.setattr(gradreg_optim.versions, "requires", lambda name: {"gradreg_optim": lines}[name])
        monkeypatch.setattr(gradreg_optim.versions, "version", version)

    return pretend


RANGE = ['trl<2,>=0.27; extra == "trl"', "torch>=2.6", 'Other.Name>=1; extra == "x"']


@pytest.mark.parametrize("version", ["0.27.0", "0.27.2", "1.16.0", "1.17.0.dev0"])
def test_inside_the_range_nothing_is_said(version, pretend):
    """Both ends of the range, and a version built from the repository, are inside."""
    pretend(RANGE, trl=version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradreg_optim.versions.warn_outside_range("trl")


@pytest.mark.parametrize("version", ["0.26.9", "2.0.0", "2.0.0.dev0"])
def test_outside_the_range_package_version_and_range_are_named(version, pretend):
    """One line with what is installed and what is tested, without advice that may break the pins of another package."""
    pretend(RANGE, trl=version)
    with pytest.warns(UserWarning, match="outside the range") as caught:
        (lambda: gradreg_optim.versions.warn_outside_range("trl"))()
    message = str(caught[0].message)
    assert f"trl {version} " in message
    assert "<2,>=0.27" in message
    assert "pip install" not in message
    assert "\n" not in message
    assert caught[0].filename == __file__


def test_every_package_is_looked_at(pretend):
    """A package that is not installed, or is in range, does not end the search."""
    pretend(['trl<2; extra == "trl"', 'transformers<6; extra == "trl"'], trl="1.0", transformers="6.1")
    with pytest.warns(UserWarning, match=r"transformers 6\.1 ") as caught:
        gradreg_optim.versions.warn_outside_range("no-such-package", "trl", "transformers")
    assert len(caught) == 1


def test_ranges_of_several_extras_are_met_together(pretend):
    """Where two extras name a package, both of their ranges count; names are compared as package indexes do."""
    pretend(['a_b>=1; extra == "x"', 'A.B<3; extra == "y"'])
    assert str(gradreg_optim.versions.declared_range("a-b")) == "<3,>=1"


def test_without_metadata_nothing_is_known(monkeypatch):
    """A source tree that was never installed declares nothing, and nothing is said."""

    def requires(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(gradreg_optim.versions, "requires", requires)
    assert str(gradreg_optim.versions.declared_range("trl")) == ""


def declared():
    """The requirements in pyproject.toml's extras, read without the code under test."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of TOML")
    extras = tomllib.loads(EXTRAS.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    return [Requirement(line) for lines in extras.values() for line in lines]


@pytest.mark.parametrize("name", CHECKED)
def test_extras_state_a_range_with_two_ends(name):
    """pyproject.toml bounds every library that is checked, and the version under test lies inside."""
    specifiers = [requirement.specifier for requirement in declared() if requirement.name == name]
    assert specifiers
    for specifier in specifiers:
        assert {part.operator for part in specifier} == {">=", "<"}
        assert installed(name) is None or specifier.contains(installed(name))


MODULES = {
    "gradreg_optim.trainers.attach": ("accelerate", "transformers", "trl"),
    "gradreg_optim.zero": ("accelerate", "deepspeed"),
}


@pytest.mark.parametrize("module", MODULES)
def test_importing_warns_of_every_version_outside(module):
    """In a fresh process where metadata claim versions that do not exist, the import names each of them."""
    needed = [name for name in MODULES[module] if name != "trl"]
    for name in needed:
        if installed(name) is None:
            pytest.skip(f"{module} stands on {name}, which is not installed")
    present = [name for name in MODULES[module] if installed(name) is not None]
    code = (
        "import importlib, warnings\n"
        "import gradreg_optim.versions as versions\n"
        f"versions.requires = lambda name: [name + '<99; extra == \"x\"' for name in {present}]\n"
        "versions.version = lambda name: '99.0'\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        f"    importlib.import_module({module!r})\n"
        "messages = [str(warning.message) for warning in caught]\n"
        "print(*(m.split(' is outside')[0] for m in messages if 'outside the range' in m), sep=',')\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip().splitlines()[-1] == ",".join(f"{name} 99.0" for name in present)
