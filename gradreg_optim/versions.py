"""Versions: do the libraries underneath lie in the ranges that the package declares?

The ranges are stated once, in the extras of ``pyproject.toml``, and read from the metadata of the installed package.
"""

from __future__ import annotations

import warnings
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name


def warn_outside_range(*packages: str) -> None:
    """Warn about each of ``packages`` that is installed in a version outside its declared range.

    Called when a module is imported that stands on them; a package that is not installed is none of its business.
    """
    for package in packages:
        try:
            installed = version(package)
        except PackageNotFoundError:
            continue
        allowed = declared_range(package)
        if not allowed.contains(installed, prereleases=True):  # installed from a repository: the next version's .dev0
            warnings.warn(
                f"{package} {installed} is outside the range that gradreg_optim supports and is tested with ({allowed}): "
                f"a step may fail or go unregularized. Install a version inside it: pip install '{package}{allowed}'.",
                stacklevel=3,
            )


def declared_range(package: str) -> SpecifierSet:
    """The versions of ``package`` that the extras allow: all of them if none names it, or if there is no metadata."""
    try:
        lines = requires("gradreg_optim") or []
    except PackageNotFoundError:  # run from a source tree that was never installed
        lines = []
    allowed = SpecifierSet()
    for requirement in map(Requirement, lines):
        if canonicalize_name(requirement.name) == canonicalize_name(package):
            allowed &= requirement.specifier
    return allowed
