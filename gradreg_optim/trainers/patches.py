"""Replaces attributes and methods of objects, and restores them afterwards."""

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any


class Patches(ExitStack):
    """What was replaced. ``close()``, or the end of a ``with`` block, restores it in the reverse order."""

    def answer(self, owner: Any, name: str, listener: Callable[..., Any]) -> "Patches":
        """Replace the method ``owner.name`` by ``listener``, whose first argument is the original."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def method(*args: Any, **kwargs: Any) -> Any:
            return listener(original, *args, **kwargs)

        return self.set(owner, name, method)

    def set(self, owner: Any, name: str, value: Any) -> "Patches":
        """Set an attribute on the object itself; return the patches, for a ``with``."""
        if name in vars(owner):
            self.callback(setattr, owner, name, vars(owner)[name])
        else:
            self.callback(delattr, owner, name)
        setattr(owner, name, value)
        return self
