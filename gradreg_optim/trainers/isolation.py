"""Isolates the trainer from the second pass: its metrics, counters, buffers and state are restored afterwards.

Losses append to metrics, count tokens, adapt coefficients and pop keys from their inputs. The second pass works on copies
of these, as they were before the first pass over the same micro-batch. Input tensors are not copied.
"""

from __future__ import annotations

import copy
from collections import UserDict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any

from torch import Tensor

_READ_ONLY = ("train_dataset", "eval_dataset", "_buffered_inputs", "args", "state", "control", "data_collator")
"""Attributes that losses only read: data, which can be large, and state of the training loop."""


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


def counters(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Copy the attributes in which a loss may keep state: numbers, strings, ``None``, tensors, containers, dataclasses."""
    found: dict[str, Any] = {}
    for name, value in attributes.items():
        if name in _READ_ONLY:
            continue
        if isinstance(value, Tensor):
            if not value.requires_grad:  # a running mean that is updated in place, for example; parameters stay out
                found[name] = value.clone()
        elif value is None or isinstance(value, (int, float, str, dict, list, deque, set)):
            found[name] = copied(value)
        elif is_dataclass(value) and not isinstance(value, type) and hasattr(value, "__dict__"):  # BCO's running moments
            found[name] = copy.copy(value)
            vars(found[name]).update(counters(vars(value)))
    return found


@contextmanager
def untouched(trainer: Any) -> Iterator[None]:
    """Let the block change attributes and state of the trainer; restore them afterwards."""
    before = dict(vars(trainer))
    trainer.state = copy.copy(trainer.state)
    try:
        yield
    finally:
        vars(trainer).clear()
        vars(trainer).update(before)
