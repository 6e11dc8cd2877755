"""Methods of objects that somebody else listens to, and how everything is put back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


class Hooks:
    """What was changed on a trainer and its parts; :meth:`undo` changes it back, last first."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], Any]] = []

    def answer(self, owner: Any, name: str, listener: Callable[..., Any]) -> None:
        """Let ``listener(original, ...)`` answer calls of ``owner.name``."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def method(*args: Any, **kwargs: Any) -> Any:
            return listener(original, *args, **kwargs)

        self.set(owner, name, method)

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of the object itself."""
        if name in vars(owner):
            self._undo.append(functools.partial(setattr, owner, name, vars(owner)[name]))
        else:
            self._undo.append(functools.partial(delattr, owner, name))
        setattr(owner, name, value)

    def call_on_undo(self, call: Callable[[], Any]) -> None:
        """Have something else done when everything is undone."""
        self._undo.append(call)

    def undo(self) -> None:
        """Put everything back."""
        while self._undo:
            self._undo.pop()()
