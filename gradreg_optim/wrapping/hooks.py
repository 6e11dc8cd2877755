"""What the wrapper shares with the wrapped optimizer, and hooks around its step that run once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks  # private: test_wrapper.py


def shared(name: str) -> Any:
    """An attribute of the wrapped optimizer that is the wrapper's as well."""
    return property(lambda self: getattr(self.optimizer, name), lambda self, value: setattr(self.optimizer, name, value))


BRIEFLY = {
    "zero_grad": "Clear the gradients of all parameters.",
    "register_step_pre_hook": "Call ``hook(wrapper, args, kwargs)`` before each step, that is before its passes.",
    "register_step_post_hook": "Call ``hook(wrapper, args, kwargs)`` after each step.",
    "register_state_dict_pre_hook": "Call ``hook(wrapper)`` before ``state_dict``.",
    "register_state_dict_post_hook": "Call ``hook(wrapper, state_dict)`` after ``state_dict``; it may return another.",
    "register_load_state_dict_pre_hook": "Call ``hook(wrapper, state_dict)`` before loading; it may return another.",
    "register_load_state_dict_post_hook": "Call ``hook(wrapper)`` after ``load_state_dict``.",
}
"""What ``help`` says of methods that are torch's own, where torch takes 25 lines for each."""


def brief(name: str) -> Callable[..., Any]:
    """Torch's method ``name``, with a docstring of one line."""

    @functools.wraps(getattr(Optimizer, name))
    def method(*args: Any, **kwargs: Any) -> Any:
        return getattr(Optimizer, name)(*args, **kwargs)

    method.__doc__ = BRIEFLY[name]
    return method


def run_hooks_around(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return the wrapper's ``step`` with hooks around it, as torch does, but without a profiler's range."""
    # The update alone has a range, the wrapped optimizer's. Hooks on every optimizer see the wrapper, which the loop holds.

    @functools.wraps(step)
    def hooked(*args: Any, **kwargs: Any) -> Any:
        wrapper = args[0]
        for before in (*_global_optimizer_pre_hooks.values(), *wrapper._optimizer_step_pre_hooks.values()):
            args, kwargs = before(wrapper, args, kwargs) or (args, kwargs)
        was_in_step, wrapper._is_in_step = wrapper._is_in_step, True
        try:
            result = step(*args, **kwargs)
        finally:
            wrapper._is_in_step = was_in_step
        for after in (*wrapper._optimizer_step_post_hooks.values(), *_global_optimizer_post_hooks.values()):
            after(wrapper, args, kwargs)
        return result

    return hooked


@contextmanager
def without_global_hooks() -> Iterator[None]:
    """Run the block without hooks on the steps of every optimizer."""
    everywhere: tuple[dict[int, Any], ...] = (_global_optimizer_pre_hooks, _global_optimizer_post_hooks)
    kept = [dict(hooks) for hooks in everywhere]
    for hooks in everywhere:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in zip(everywhere, kept, strict=True):
            hooks.update(before)
