"""What MkDocs does here beyond mkdocs.yml, so that one text serves the repository and the site.

Pages link to files of the repository by relative paths, as GitHub reads them. On the site a link to a page
stays inside the site; README.md is the home page, and the results of the benchmarks are pages as well. Links
to other files lead to the repository, whose address is in pyproject.toml alone.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
OUTSIDE = (
    "README.md",
    "CHANGELOG.md",
    "examples/README.md",
    "examples/*/README.md",
    "benchmarks/README.md",
    "benchmarks/results/*/result.md",
)
"""Pages that are not in docs/."""
PICTURES = ("benchmarks/results/*/*.png",)
SETTINGS = "gradreg_optim/wrapping/settings.py"
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Take the addresses of site and repository from pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    urls = dict(re.findall(r'^(\w+) = "(https:[^"]*)"', text, re.MULTILINE))
    config.repo_url = urls["Repository"]
    config.repo_name = "Repository"
    config.site_url = urls["Documentation"]
    return config


def address(path: str) -> str:
    """Where on the site the source of a file of the repository is."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and pictures that are not in docs/."""
    for pattern in (*OUTSIDE, *PICTURES):
        for file in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, address(str(file.relative_to(ROOT))), abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to where their files are on the site, or else to the repository."""
    source = Path(page.file.abs_src_path or "").relative_to(ROOT)

    def led(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(source.parent.as_posix(), match[1]))
        if files.get_file_from_path(address(path)) is not None:
            return posixpath.relpath(address(path), posixpath.dirname(page.file.src_uri) or ".")
        if not (ROOT / path).exists():
            raise PluginError(f"{source} links to {match[1]}, and there is no {path}")
        return f"{config.repo_url}/{'tree' if (ROOT / path).is_dir() else 'blob'}/main/{path}"

    kept: list[str] = []

    def hide(code: re.Match[str]) -> str:
        kept.append(code[0])
        return f"\0{len(kept) - 1}\0"

    hidden = CODE.sub(hide, markdown)
    return re.sub("\0(\\d+)\0", lambda number: kept[int(number[1])], LINK.sub(led, hidden))


class PlainRoles(griffe.Extension):
    """Turns docstrings with the roles of reStructuredText, written for ``help()``, into Markdown."""

    def __init__(self) -> None:
        super().__init__()
        settings = (ROOT / SETTINGS).read_text(encoding="utf-8")
        self.defaults = dict(re.findall(r"^(DEFAULT_\w+) = \w+\((.+)\)$", settings, re.MULTILINE))

    def on_object(self, *, obj: griffe.Object, **_kwargs: Any) -> None:
        """Rewrite the docstring of an object that was found."""
        if obj.docstring is not None:
            obj.docstring.value = in_markdown(obj.docstring.value)

    def on_function(self, *, func: griffe.Function, **_kwargs: Any) -> None:
        """Show defaults that have a name as the numbers that they are."""
        for parameter in func.parameters:
            parameter.default = self.defaults.get(str(parameter.default), parameter.default)


def in_markdown(text: str) -> str:
    """``text`` without roles and without the double colons that begin a block of code.

    >>> in_markdown("See :meth:`passes` and :class:`~gradreg_optim.GradReg`::")
    'See `passes` and `GradReg`:'
    """
    text = re.sub(r":math:`([^`]*)`", lambda math: f"`{math[1].replace('_', '')}`", text)
    text = re.sub(r"\\frac\{(\w)\}\{(\w)\}", r"(\1/\2)·", text)
    text = re.sub(r":\w+:`(?:~(?:[\w.]*\.)?|)([\w.]+)`", r"`\1`", text)
    text = re.sub(r"^::$\n", "", text, flags=re.MULTILINE)
    return re.sub(r"::$", ":", text, flags=re.MULTILINE)
