"""Checks the installed versions of libraries against the ranges that the package declares.

The extras in ``pyproject.toml`` state the ranges; they are read from the metadata of the installed package.
"""

from __future__ import annotations

import warnings
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name


def warn_outside_range(*packages: str) -> None:
    """Warn about each of ``packages`` whose installed version is outside its declared range.

    Call it at the import of a module that needs them. Packages that are not installed are ignored.
    """
    for package in packages:
        try:
            installed = version(package)
        except PackageNotFoundError:
            continue
        allowed = declared_range(package)
        if not allowed.contains(installed, prereleases=True):  # a build from a repository is a .dev0 of the next version
            warnings.warn(
                f"{package} {installed} is outside the range that gradreg_optim is tested with ({allowed}). It may work, "
                "and a step that would lose its penalty raises an error. If another package needs this version, keep it.",
                stacklevel=3,
            )


def declared_range(package: str) -> SpecifierSet:
    """The versions of ``package`` that the extras allow: any version if no extra names it or there is no metadata."""
    try:
        lines = requires("gradreg_optim") or []
    except PackageNotFoundError:  # a source tree that was never installed
        lines = []
    allowed = SpecifierSet()
    for requirement in map(Requirement, lines):
        if canonicalize_name(requirement.name) == canonicalize_name(package):
            allowed &= requirement.specifier
    return allowed
