"""What a loss leaves behind on its trainer, kept from the second pass: metrics, counters, buffers, the trainer's state.

Losses append to lists of metrics, count tokens, adapt coefficients and pop keys from their inputs. The second pass works
on copies of all that, as it stood before the first pass over the same micro-batch. The tensors of inputs are not copied.
"""

from __future__ import annotations

import copy
from collections import UserDict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any

from torch import Tensor

_READ = ("train_dataset", "eval_dataset", "_buffered_inputs", "args", "state", "control", "data_collator")
"""Attributes that losses only read: data, which is long, and what the training loop keeps."""


def copied(value: Any) -> Any:
    """Copies of the containers, the tensors themselves inside.

    >>> inputs = {"labels": [1, 2]}
    >>> copied(inputs)["labels"].append(3); inputs
    {'labels': [1, 2]}
    """
    if isinstance(value, (dict, list, deque)):
        container: Any = copy.copy(value)
        for key in range(len(container)) if isinstance(container, (list, deque)) else list(container):
            container[key] = copied(container[key])
        return container
    if isinstance(value, UserDict):
        wrapper = copy.copy(value)
        wrapper.data = copied(value.data)
        return wrapper
    return copy.copy(value) if isinstance(value, set) else value


def counters(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """What a loss can count with: numbers, strings, ``None``, and copies of tensors, containers and dataclasses."""
    found: dict[str, Any] = {}
    for name, value in attributes.items():
        if name in _READ:
            continue
        if isinstance(value, Tensor):
            if not value.requires_grad:  # a running mean, say, written in place; what is trained belongs to the model
                found[name] = value.clone()
        elif isinstance(value, (dict, list, deque, set)):
            found[name] = copied(value)
        elif value is None or isinstance(value, (bool, int, float, str)):
            found[name] = value
        elif is_dataclass(value) and not isinstance(value, type) and hasattr(value, "__dict__"):  # BCO's running moments
            found[name] = copy.copy(value)
            vars(found[name]).update(counters(vars(value)))
    return found


@contextmanager
def untouched(trainer: Any) -> Iterator[None]:
    """Let the block put other values, such as recorded :func:`counters`, on the trainer; afterwards its own are back."""
    before = dict(vars(trainer))
    trainer.state = copy.copy(trainer.state)
    try:
        yield
    finally:
        vars(trainer).clear()
        vars(trainer).update(before)
