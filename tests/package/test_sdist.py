"""What goes to an index: the README's links, and the list of what the source distribution holds."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

pytest.importorskip("setuptools", reason="setup.py is read")
ROOT = Path(__file__).parents[2]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
LINKS = re.compile(r"\]\(([^)]*)\)")


def on_index(readme: str) -> str:
    """``readme`` as the index shows it."""
    return str(runpy.run_path(str(ROOT / "setup.py"))["readme_of_index"](readme, PROJECT))


def test_links_on_an_index_page_are_absolute() -> None:
    """Links into the repository lead to the tag of this version; what they lead to is there, and the rest stays as it is."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    before, after = LINKS.findall(readme), LINKS.findall(on_index(readme))
    (repository,) = re.findall(r'^Repository = "(https://[^"]+)"', PROJECT, re.MULTILINE)
    (version,) = re.findall(r'^version = "(.+)"', PROJECT, re.MULTILINE)
    relative = [link for link in before if not link.startswith(("https:", "#"))]
    assert len(relative) > 3
    assert [link for link in after if not link.startswith(("https://", "#"))] == []
    for link, absolute in zip(before, after, strict=True):
        if link in relative:
            assert re.sub(f"^{repository}/(blob|raw)/v{version}/", "", absolute) == link
            assert (ROOT / link.partition("#")[0]).exists(), link
        else:
            assert absolute == link


def test_pictures_are_raw_and_code_is_left_alone() -> None:
    """A picture needs the file itself, not the page about it; a call in code looks like no link."""
    (repository,) = re.findall(r'^Repository = "(https://[^"]+)"', PROJECT, re.MULTILINE)
    text = on_index("![a picture](a/b.png) [a page](c.md#part) [out](https://example.org) [here](#here) w[0](x) f(x)[0]")
    assert re.sub(r"/v[\d.]+\w*/", "/TAG/", text) == (
        f"![a picture]({repository}/raw/TAG/a/b.png) [a page]({repository}/blob/TAG/c.md#part) "
        "[out](https://example.org) [here](#here) w[0](x) f(x)[0]"
    )
