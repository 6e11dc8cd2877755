"""Kinds of arguments, for ``argparse``: what breaks a rule ends in one line before anything is run."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

__all__ = ["add_output", "at_least", "existing", "require_match"]


def add_output(parser: argparse.ArgumentParser, question: str) -> None:
    """Add ``--output``: the path of the results."""
    words = f"path without suffix; default: results/<date>-{question}/result"
    parser.add_argument("--output", type=Path, help=words)


def at_least(low: int, *, multiple_of: int = 1) -> Callable[[str], int]:
    """An integer from ``low`` on, a multiple of ``multiple_of``."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < low or int(text) % multiple_of:
            rule = f" and a multiple of {multiple_of}" if multiple_of > 1 else ""
            raise argparse.ArgumentTypeError(f"{text} must be an integer >= {low}{rule}")
        return int(text)

    return read


def existing(text: str) -> Path:
    """A file that is there."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text} must be a file, and there is none of this name")
    return Path(text)


def require_match(
    parser: argparse.ArgumentParser, flag: str, parts: Iterable[str] | None, names: Iterable[str]
) -> None:
    """End with an error if one of ``parts``, which ``flag`` gave, is part of none of ``names``."""
    names = list(names)
    for part in parts or ():
        if not any(part in name for name in names):
            parser.error(f"{flag} {part}: must be part of one of: {', '.join(names)}")
