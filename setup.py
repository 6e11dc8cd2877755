"""What pyproject.toml cannot say: on an index page, the README's links lead to the repository."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
LINK = re.compile(r"(?<!\w)(!?)(\[[^\]]*\])\((?!\w+:|#)([^)\s]+)\)")


def readme_of_index(readme: str, project: str) -> str:
    """``readme`` with absolute links.

    Args:
        readme: Markdown with links relative to the root of the repository.
        project: the text of pyproject.toml, which has the repository's address and the version. The release
            has the tag ``v<version>``, so that the page of an old release goes on showing its own files.
    """
    values = dict(re.findall(r'^(\w+) = "([^"]*)"', project, re.MULTILINE))
    address, tag = values["Repository"], f"v{values['version']}"

    def absolute(link: re.Match[str]) -> str:
        return f"{link[1]}{link[2]}({address}/{'raw' if link[1] else 'blob'}/{tag}/{link[3]})"

    return LINK.sub(absolute, readme)


if __name__ == "__main__":
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "pyproject.toml")]
    setup(long_description=readme_of_index(*texts), long_description_content_type="text/markdown")
