"""Isolates the trainer from the second pass: its metrics, counters and state are restored afterwards.

Losses append to metrics, count tokens, adapt coefficients and pop keys from their inputs. The second pass finds all these as
they were before the first pass over the same micro-batch, and copies of the inputs. Input tensors are not copied.
"""

from __future__ import annotations

import copy
from collections import UserDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gradreg_optim.trainers.snapshot import Snapshot


def copied(value: Any) -> Any:
    """Copy containers recursively; the tensors inside are shared.

    >>> inputs = {"labels": [1, 2]}
    >>> copied(inputs)["labels"].append(3); inputs
    {'labels': [1, 2]}
    """
    if isinstance(value, (dict, UserDict, list, deque)):
        container: Any = copy.copy(value)
        for key in range(len(container)) if isinstance(container, (list, deque)) else list(container):
            container[key] = copied(container[key])
        return container
    return copy.copy(value) if isinstance(value, set) else value


@contextmanager
def untouched(trainer: Any) -> Iterator[None]:
    """Let the block change attributes and state of the trainer; restore them afterwards."""
    before, state = dict(vars(trainer)), Snapshot(trainer)
    try:
        yield
    finally:
        vars(trainer).clear()
        vars(trainer).update(before)
        state.restore()
