"""Training stacks that are not installed: modules with the few names that a plugin relies upon, as the stack has them."""

import importlib
import sys
from types import ModuleType

import pytest


def plugin(patch: pytest.MonkeyPatch, name: str, **modules):
    """Import ``gradreg_optim.integrations.<name>`` anew over ``modules``, whose names have ``__`` for dots."""
    for path, names in modules.items():
        parts = path.split("__")
        for end in range(1, len(parts) + 1):
            part = ".".join(parts[:end])
            if end == len(parts) or part not in sys.modules:
                patch.setitem(sys.modules, part, ModuleType(part))
        vars(sys.modules[".".join(parts)]).update(names)
    full = f"gradreg_optim.integrations.{name}"
    patch.delitem(sys.modules, full, raising=False)
    module = importlib.import_module(full)
    patch.setitem(sys.modules, full, module)
    return module
