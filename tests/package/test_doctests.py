"""The examples in the docstrings."""

import doctest
import importlib
import pathlib

import pytest

import gradreg_optim

ROOT = pathlib.Path(gradreg_optim.__file__).parent

MODULES = sorted(
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in ROOT.rglob("*.py")
    # Modules without examples, and their libraries, are not loaded.
    if ">>> " in path.read_text(encoding="utf-8")
)


def test_the_core_has_examples():
    """A search that finds nothing would pass."""
    found = {"config", "optimizer", "core.schemes", "core.multi_tensor", "wrapping.schedule"}
    assert {f"gradreg_optim.{name}" for name in found} <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_examples_hold(name):
    """Every docstring example prints what it says."""
    if name.startswith("gradreg_optim.trainers."):
        pytest.importorskip("transformers", reason="trainers come with the extra [trl]")
    result = doctest.testmod(
        importlib.import_module(name),
        optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS,
        raise_on_error=False,
    )
    assert result.attempted > 0
    assert result.failed == 0
