"""What a loss may leave behind on its trainer, kept from the second pass: metrics, counters, generators, inputs.

A snapshot walks what is reachable from the trainer: its attributes and those of its class, its ``state``, and attributes of
modules; containers, arrays, tensors, generators, and objects of the user's own code or with an ``update`` method, such as
metrics. It keeps shallow copies, so objects stay the ones that others hold, too. Never visited: parameters, a model's
buffers (:mod:`gradreg_optim.core.repeatable`), datasets, optimizers, and the objects of installed libraries.

Cost: a copy of each module's ``__dict__``, and copies of arrays and tensors of at most ``LARGE`` elements. Larger ones are
watched; one that a loss changes is named. What to do with an object is found out once for each class.
"""

from __future__ import annotations

import copy
import functools
import random
import sys
import warnings
from array import array
from collections import UserDict, UserList, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from operator import is_
from types import NoneType, SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedTokenizerBase, Trainer

from gradreg_optim.core.values import is_expanded

LARGE = 2**22

_READ_ONLY = {
    "train_dataset", "eval_dataset", "_buffered_inputs", "args", "state", "control", "data_collator", "accelerator",
    "optimizer", "lr_scheduler", "callback_handler", "processing_class", "_gradreg_attachment",
}  # fmt: skip
"""Attributes that losses only read, or that have rules of their own."""

_VALUES = (NoneType, bool, int, float, complex, str, bytes, tuple, frozenset)
_CONTAINERS = (dict, list, deque, set, bytearray, array)
_OTHERS = (type, Dataset, DataLoader, Sampler, Optimizer, PreTrainedTokenizerBase)
_ENGINES = ("torch.nn.parallel", "torch.distributed", "torch._dynamo", "deepspeed", "accelerate")
_OF_DEEPSPEED = ("ds_", "applied_pre_backward_ref_cnt", "_original_parameters", "_external_params")  # of ZeRO stage 3
_LIBRARIES = {
    "torch", "transformers", "peft", "accelerate", "deepspeed", "datasets", "gradreg_optim", "numpy", "vllm", "ray",
}  # fmt: skip
_OF_MODULES = set(vars(nn.Module()))
_named: WeakKeyDictionary[Trainer, set[str]] = WeakKeyDictionary()
_looked_at: WeakKeyDictionary[nn.Module, tuple[int, list[str]]] = WeakKeyDictionary()


def copied(value: Any, *, with_tensors: bool = False) -> Any:
    """Copy containers recursively; the tensors inside are shared, unless they are copied ``with_tensors``.

    >>> inputs = {"labels": [1, 2]}
    >>> copied(inputs)["labels"].append(3); inputs
    {'labels': [1, 2]}
    """
    if isinstance(value, Tensor):
        return value.clone() if with_tensors else value
    if type(value) is tuple:
        return tuple(copied(item, with_tensors=with_tensors) for item in value)
    if isinstance(value, (dict, UserDict, list, deque)):
        container: Any = copy.copy(value)
        for key in range(len(container)) if isinstance(container, (list, deque)) else list(container):
            container[key] = copied(container[key], with_tensors=with_tensors)
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


class Snapshot:
    """The state of the losses of ``trainer`` now; ``restore`` puts it back."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._restorers: list[Callable[[], object]] = []
        self._modules: list[tuple[dict[str, Any], dict[str, Any]]] = []  # their attributes, and copies
        self._seen: set[int] = set()
        self._visit([("model", trainer.model)])
        self._keep_attributes(trainer, skip=_READ_ONLY)
        self._keep_attributes(trainer.state, skip={"log_history"})
        for kind in type(trainer).__mro__[: type(trainer).__mro__.index(Trainer)]:
            self._visit(list(vars(kind).items()))

    def restore(self) -> None:
        """Write everything back into the objects that held it."""
        for attributes, kept in self._modules:
            if len(kept) != len(attributes) or not all(map(is_, kept.values(), attributes.values())):
                for key in kept.keys() - _OF_MODULES:
                    if attributes.get(key) is not kept[key] and not key.startswith(_OF_DEEPSPEED) and _is_state(kept[key]):
                        attributes[key] = kept[key]
        for restore in self._restorers:
            restore()

    def _visit(self, named: Iterable[tuple[str, Any]]) -> None:
        """Keep what these values hold, if there is something to keep."""
        for name, value in named:
            keep = _how_to_keep(value.__class__)
            if keep is not None and id(value) not in self._seen:
                self._seen.add(id(value))
                keep(self, value, name)

    def _keep_attributes(self, owner: Any, name: str = "", skip: Collection[str] = ()) -> None:
        """Keep the attributes of an object that are state, and what they hold; new ones are removed afterwards."""

        def look() -> dict[str, Any]:
            slots = {key: getattr(owner, key) for key in _slots(owner.__class__) if hasattr(owner, key)}
            return {key: value for key, value in (slots | getattr(owner, "__dict__", {})).items() if key not in skip}

        before = look()
        kept = {key: value for key, value in before.items() if _is_state(value)}
        if not hasattr(owner, "__dict__") and not before:
            self._name(name, "keeps its state where it cannot be copied")

        def restore() -> None:
            now = look()
            for key in [key for key, value in now.items() if key not in kept and _is_state(value)]:
                object.__delattr__(owner, key)
            for key, value in kept.items():
                if key not in now or now[key] is not value:
                    object.__setattr__(owner, key, value)

        self._restorers.append(restore)
        self._visit((f"{name}.{key}" if name else key, value) for key, value in before.items())

    def _keep_modules(self, root: nn.Module, name: str) -> None:
        """Keep the attributes of a module and of all below it."""
        modules: list[Any] = [root]
        for module in modules:  # the loop appends to it
            attributes = vars(module)
            for part in module._modules.values():
                if part is not None and id(part) not in self._seen:
                    self._seen.add(id(part))
                    modules.append(part)
            if _is_of_engine(module.__class__):
                continue
            self._modules.append((attributes, attributes.copy()))
            if names := _worth_visiting(module):
                self._visit([(f"{name}.{key}", attributes[key]) for key in names])
            if root is not self._trainer.model:  # which is visited first
                self._visit([(name, module._buffers)])

    def _keep_container(self, container: Any, name: str) -> None:
        if not isinstance(container, tuple):
            kept = container.copy() if hasattr(container, "copy") else container[:]
            self._restorers.append(functools.partial(_refill, container, kept))
        if len(container) <= 10_000 and not isinstance(container, (bytearray, array)):
            values = container.values() if isinstance(container, dict) else container
            self._visit((f"{name}[{number}]", value) for number, value in enumerate(values))

    def _keep_tensor(self, tensor: Tensor, name: str) -> None:
        if tensor.requires_grad or is_expanded(tensor):
            return
        if tensor.numel() <= LARGE:
            kept = tensor.clone()

            def restore() -> None:
                with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                    tensor.copy_(kept)

            self._restorers.append(restore)
        elif not tensor.is_inference():
            self._watch(name, lambda: [tensor._version])

    def _keep_array(self, values: Any, name: str) -> None:
        if not values.flags.writeable:
            return
        if values.size <= LARGE:
            self._restorers.append(functools.partial(values.__setitem__, ..., values.copy()))
        else:
            self._watch(name, lambda: values.flat[:: values.size // 4096].tolist())

    def _keep_generator(self, generator: Any, _name: str) -> None:
        if hasattr(generator, "bit_generator"):  # of NumPy
            restore = functools.partial(setattr, generator.bit_generator, "state", generator.bit_generator.state)
        elif isinstance(generator, random.Random):
            restore = functools.partial(generator.setstate, generator.getstate())
        else:
            restore = functools.partial(generator.set_state, generator.get_state())
        self._restorers.append(restore)

    def _watch(self, name: str, look: Callable[[], list[Any]]) -> None:
        before = look()

        def compare() -> None:
            if look() != before:
                self._name(name, f"has more than {LARGE} elements, of which no copy is kept")

        self._restorers.append(compare)

    def _name(self, name: str, why: str) -> None:
        """Warn about state that is not restored, once for each name."""
        named = _named.setdefault(self._trainer, set())
        if name not in named:
            named.add(name)
            warnings.warn(
                f"{type(self._trainer).__name__}: {name} {why}. A loss that changes it does so in the second pass as well. "
                "Keep such state in plain attributes of the trainer, or update it outside compute_loss.",
                stacklevel=2,
            )


def _refill(container: Any, kept: Any) -> None:
    """Let ``container`` hold what ``kept`` holds, unless it does."""
    if len(kept) == len(container) and all(map(is_, _items(kept), _items(container))):
        return
    if isinstance(container, (list, bytearray, array)):
        container[:] = kept
    else:
        container.clear()
        getattr(container, "extend" if isinstance(container, deque) else "update")(kept)


def _items(container: Any) -> Iterable[Any]:
    return [part for item in container.items() for part in item] if isinstance(container, dict) else container


def _is_state(value: Any) -> bool:
    """Whether an attribute with this value is put back when it has been given another one."""
    if isinstance(value, Tensor):
        return not value.requires_grad
    return isinstance(value, _VALUES) or _how_to_keep(value.__class__) not in (None, Snapshot._keep_modules)


def _worth_visiting(module: nn.Module) -> list[str]:
    """Names of attributes that may hold state in which something changes in place; looked for when there are new ones."""
    attributes = vars(module)
    size, names = _looked_at.get(module, (0, []))
    if size != len(attributes):
        is_library = type(module).__module__.startswith(("torch.", "peft."))
        names = [
            name
            for name, value in attributes.items()
            if name not in _OF_MODULES
            and not name.startswith(_OF_DEEPSPEED)
            and _is_state(value)
            and not isinstance(value, (*_VALUES, Tensor, *_CONTAINERS) if is_library else _VALUES)
        ]
        _looked_at[module] = (len(attributes), names)
    return names


@functools.cache
def _how_to_keep(kind: Any) -> Callable[[Snapshot, Any, str], None] | None:
    """The method that keeps what such objects hold; ``None`` if they hold no state."""
    numpy: Any = sys.modules.get("numpy")
    arrays = () if numpy is None else (numpy.ndarray, numpy.generic)
    generators = () if numpy is None else (numpy.random.RandomState, numpy.random.Generator)
    ways: tuple[tuple[Any, Any], ...] = (
        (Tensor, Snapshot._keep_tensor if kind is Tensor else None),
        ((*_CONTAINERS, tuple), Snapshot._keep_container),
        (arrays, Snapshot._keep_array),
        (nn.Module, Snapshot._keep_modules),
        ((random.Random, torch.Generator, *generators), Snapshot._keep_generator),
        (object, Snapshot._keep_attributes if _is_own(kind) else None),
    )
    return next(way for kinds, way in ways if issubclass(kind, kinds))  # type: ignore[no-any-return]


def _is_own(kind: Any) -> bool:
    """Whether a loss may keep state in such objects: of the user's code, or of a library, but like a metric."""
    if issubclass(kind, (SimpleNamespace, UserDict, UserList)):
        return True
    root = kind.__module__.partition(".")[0]
    if issubclass(kind, _OTHERS) or root in _LIBRARIES or (root in sys.stdlib_module_names and root != "__main__"):
        return False
    is_installed = "site-packages" in str(getattr(sys.modules.get(root), "__file__", ""))
    return not is_installed or is_dataclass(kind) or callable(getattr(kind, "update", None))


@functools.cache
def _is_of_engine(kind: Any) -> bool:
    return kind.__module__.startswith(_ENGINES)  # type: ignore[no-any-return]


@functools.cache
def _slots(kind: Any) -> list[str]:
    """The names of attributes that such objects keep elsewhere than in their ``__dict__``."""
    declared = [vars(base).get("__slots__", ()) for base in kind.__mro__]
    names = (name for slots in declared for name in ((slots,) if isinstance(slots, str) else slots))
    return [name for name in names if not name.startswith("__")]
