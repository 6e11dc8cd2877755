"""Isolates a trainer from the second pass, which works on copies of its metrics, counters and ``state``.

Copied are attributes of the trainer and of ``trainer.state``: numbers, texts, containers, tensors and arrays
of at most ``LARGE`` elements, and objects with an ``update`` method, such as metrics, also inside containers.
Anything else that a loss changes it changes in every pass; the repeated loss and ``loss_check`` tell when
that matters.
"""

import copy
import functools
import math
from collections import UserDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import NoneType
from typing import Any

import numpy
from torch import Tensor, nn
from torch.optim import Optimizer

LARGE, MANY = 2**22, 10_000
"""Elements of tensors and arrays, and of containers, up to which they are copied."""

# Attributes of trainers and of their ``state`` that losses only read, or that have rules of their own.
_READ_ONLY = {
    "train_dataset", "eval_dataset", "_buffered_inputs", "args", "state", "control", "data_collator",
    "accelerator", "optimizer", "lr_scheduler", "callback_handler", "processing_class", "_gradreg_attachment",
    "log_history",
}  # fmt: skip

_DATA = (NoneType, bool, int, float, complex, str, bytes, tuple, frozenset, numpy.generic, numpy.ndarray)
_CONTAINERS = (dict, UserDict, list, deque, set)

State = list[dict[str, Any]]  # attributes of the trainer, and of its ``state``


def state_of(trainer: Any) -> State:
    """Copies of what a loss may change on ``trainer``."""
    return copied(_attributes(trainer), with_tensors=True)  # type: ignore[no-any-return]


def put_state(trainer: Any, state: State) -> None:
    """Give ``trainer``, inside :func:`untouched`, copies of ``state``, and remove what it has got since."""
    owners = (trainer, trainer.state)
    for owner, now, kept in zip(owners, _attributes(trainer), copied(state, with_tensors=True), strict=True):
        for name in now.keys() - kept.keys():
            delattr(owner, name)
        vars(owner).update(kept)


@contextmanager
def untouched(trainer: Any) -> Iterator[None]:
    """Let the block work on copies of the trainer's state and replace attributes; restore them afterwards."""
    before, state = dict(vars(trainer)), _attributes(trainer)
    trainer.state = copy.copy(trainer.state)
    put_state(trainer, state)
    try:
        yield
    finally:
        vars(trainer).clear()
        vars(trainer).update(before)


def copied(value: Any, *, with_tensors: bool = False, memo: dict[int, Any] | None = None) -> Any:
    """Copy containers recursively, and ``with_tensors`` also the tensors, arrays and metrics inside.

    >>> inputs = {"labels": [1, 2]}
    >>> copied(inputs)["labels"].append(3); inputs
    {'labels': [1, 2]}
    """
    memo = {} if memo is None else memo
    if id(value) in memo:
        return memo[id(value)]
    inner = functools.partial(copied, with_tensors=with_tensors, memo=memo)
    if type(value) is tuple:
        return tuple(map(inner, value))
    is_object = isinstance(value, _CONTAINERS) or (with_tensors and _is_metric(value))
    is_array = (
        with_tensors
        and (_is_plain(value) or isinstance(value, numpy.ndarray))
        and math.prod(value.shape) <= LARGE
    )
    if is_array:
        twin = value.clone() if isinstance(value, Tensor) else value.copy()
    else:
        twin = copy.copy(value) if is_object else value
    memo[id(value)] = twin  # before what is inside, which may lead back to it
    if is_object and not isinstance(value, set):
        parts: Any = twin if isinstance(twin, _CONTAINERS) else vars(twin)
        keys = range(len(parts)) if isinstance(parts, (list, deque)) else list(parts)
        for key in keys if len(parts) <= MANY else ():
            parts[key] = inner(parts[key])
    return twin


def _attributes(trainer: Any) -> State:
    owners = (trainer, trainer.state)
    return [
        {k: v for k, v in vars(owner).items() if k not in _READ_ONLY and _is_state(v)} for owner in owners
    ]


def _is_state(value: Any) -> bool:
    return isinstance(value, (*_DATA, *_CONTAINERS)) or _is_plain(value) or _is_metric(value)


def _is_plain(value: Any) -> bool:
    return type(value) is Tensor and not value.requires_grad


def _is_metric(value: Any) -> bool:
    """Whether ``value`` is an object that is updated as metrics are, and no model."""
    if isinstance(value, (type, Optimizer)) or not callable(getattr(type(value), "update", None)):
        return False
    return hasattr(value, "__dict__") and not (
        isinstance(value, nn.Module) and any(True for _ in value.parameters())
    )
