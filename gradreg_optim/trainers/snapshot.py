"""What the state of a loss holds at one moment: everything that it may keep on its trainer, to be put back in place.

A snapshot walks what is reachable from the trainer: its attributes and those of its class, its ``state``, and attributes of
modules; containers, arrays, tensors, generators, and objects of the user's own code or with an ``update`` method, such as
metrics. It keeps shallow copies, so objects stay the ones that others hold, too. Never visited: parameters, a model's
buffers (:mod:`gradreg_optim.core.repeatable`), datasets, optimizers, and the objects of installed libraries.

Cost: copies of arrays and tensors of at most ``LARGE`` elements. Larger ones are watched; one that a loss changes is named.
"""

from __future__ import annotations

import functools
import random
import sys
import warnings
from array import array
from collections import UserDict, UserList, deque
from collections.abc import Callable, Collection, Iterable
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

LARGE = 2**22

_READ_ONLY = {
    "train_dataset", "eval_dataset", "_buffered_inputs", "args", "state", "control", "data_collator", "accelerator",
    "optimizer", "lr_scheduler", "callback_handler", "processing_class", "_gradreg_attachment",
}  # fmt: skip
"""Attributes that losses only read, or that have rules of their own."""

_VALUES = (NoneType, bool, int, float, complex, str, bytes, tuple, frozenset)
_CONTAINERS = (dict, list, deque, set, bytearray, array, UserDict, UserList)
_OTHERS = (type, Dataset, DataLoader, Sampler, Optimizer, PreTrainedTokenizerBase)
_ENGINES = ("torch.nn.parallel", "torch.distributed", "torch._dynamo", "deepspeed", "accelerate")
_OF_DEEPSPEED = ("ds_", "applied_pre_backward_ref_cnt", "_original_parameters", "_external_params")  # of ZeRO stage 3
_LIBRARIES = {
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "deepspeed",
    "datasets",
    "gradreg_optim",
    "numpy",
    "vllm",
    "ray",
}
_OF_MODULES = set(vars(nn.Module()))
_named: WeakKeyDictionary[Trainer, set[str]] = WeakKeyDictionary()
_looked_at: WeakKeyDictionary[nn.Module, tuple[int, list[str]]] = WeakKeyDictionary()


class Snapshot:
    """The state of the losses of ``trainer`` now; ``restore`` puts it back."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._restorers: list[Callable[[], object]] = []
        self._seen: set[int] = set()
        model: Any = trainer.model
        self._of_model = {id(part) for part in model.modules()}
        self._visit_attributes(trainer, skip=_READ_ONLY)
        self._visit_attributes(trainer.state, skip={"log_history"})
        for kind in type(trainer).__mro__[: type(trainer).__mro__.index(Trainer)]:
            for name, value in list(vars(kind).items()):
                self._visit(value, name)

    def restore(self) -> None:
        """Write everything back into the objects that held it."""
        for restore in self._restorers:
            restore()

    def _visit(self, value: Any, name: str) -> None:
        if (isinstance(value, _VALUES) and not isinstance(value, tuple)) or id(value) in self._seen:
            return
        self._seen.add(id(value))
        numpy: Any = sys.modules.get("numpy")
        if isinstance(value, Tensor):
            self._visit_tensor(value, name)
        elif isinstance(value, (*_CONTAINERS, tuple)):
            self._visit_container(value, name)
        elif numpy is not None and isinstance(value, numpy.ndarray):
            self._visit_array(value, name)
        elif isinstance(value, nn.Module):
            for part in value.modules():
                self._visit_module(part, name)
        elif isinstance(value, random.Random) or (numpy and isinstance(value, numpy.random.RandomState)):
            getter, setter = ("getstate", "setstate") if isinstance(value, random.Random) else ("get_state", "set_state")
            self._restorers.append(functools.partial(getattr(value, setter), getattr(value, getter)()))
        elif isinstance(value, torch.Generator):
            self._restorers.append(functools.partial(value.set_state, value.get_state()))
        elif numpy and isinstance(value, numpy.random.Generator):
            self._restorers.append(functools.partial(setattr, value.bit_generator, "state", value.bit_generator.state))
        elif _is_own(value):
            self._visit_attributes(value, name)

    def _visit_attributes(self, owner: Any, name: str = "", skip: Collection[str] = ()) -> None:
        """Keep the attributes of an object that are state, and what they hold; new ones are removed afterwards."""

        def look() -> dict[str, Any]:
            return {key: value for key, value in _attributes(owner).items() if key not in skip}

        kept = {key: value for key, value in look().items() if _is_state(value)}
        if not hasattr(owner, "__dict__") and not look():
            self._name(name, "keeps its state where it cannot be copied")

        def restore() -> None:
            now = look()
            for key in [key for key, value in now.items() if key not in kept and _is_state(value)]:
                object.__delattr__(owner, key)
            for key, value in kept.items():
                if key not in now or now[key] is not value:
                    object.__setattr__(owner, key, value)

        self._restorers.append(restore)
        for key, value in look().items():
            self._visit(value, f"{name}.{key}" if name else key)

    def _visit_module(self, module: nn.Module, name: str) -> None:
        if type(module).__module__.startswith(_ENGINES):
            return
        attributes = vars(module)
        kept = attributes.copy()

        def restore() -> None:
            if len(kept) == len(attributes) and all(map(is_, kept.values(), attributes.values())):
                return
            for key in kept.keys() - _OF_MODULES:
                if attributes.get(key) is not kept[key] and not key.startswith(_OF_DEEPSPEED) and _is_state(kept[key]):
                    attributes[key] = kept[key]

        self._restorers.append(restore)
        for key in _worth_visiting(module):
            self._visit(attributes[key], f"{name}.{key}")
        if id(module) not in self._of_model:
            self._visit(module._buffers, name)

    def _visit_container(self, container: Any, name: str) -> None:
        if isinstance(container, (UserDict, UserList)):
            container = container.data
        kept = (
            container if isinstance(container, tuple) else container.copy() if hasattr(container, "copy") else container[:]
        )

        def restore() -> None:
            if isinstance(container, (list, bytearray, array)):
                container[:] = kept  # type: ignore[assignment]
            else:
                container.clear()
                getattr(container, "extend" if isinstance(container, deque) else "update")(kept)

        def restore_if_changed() -> None:
            if len(kept) != len(container) or not all(map(is_, _items(kept), _items(container))):
                restore()

        if not isinstance(container, tuple):
            self._restorers.append(restore_if_changed)
        if len(container) <= 10_000 and not isinstance(container, (bytearray, array)):
            for number, value in enumerate(container.values() if isinstance(container, dict) else container):
                self._visit(value, f"{name}[{number}]")

    def _visit_tensor(self, tensor: Tensor, name: str) -> None:
        if tensor.requires_grad or type(tensor) is not Tensor:
            return
        if tensor.numel() <= LARGE:
            kept = tensor.clone()

            def restore() -> None:
                with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                    tensor.copy_(kept)

            self._restorers.append(restore)
        elif not tensor.is_inference():
            self._watch(name, lambda: [tensor._version])

    def _visit_array(self, values: Any, name: str) -> None:
        if not values.flags.writeable:
            return
        if values.size <= LARGE:
            self._restorers.append(functools.partial(values.__setitem__, ..., values.copy()))
        else:
            self._watch(name, lambda: values.flat[:: values.size // 4096].tolist())

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


def _items(container: Any) -> Iterable[Any]:
    return [part for item in container.items() for part in item] if isinstance(container, dict) else container


def _attributes(owner: Any) -> dict[str, Any]:
    """The attributes of an object, those in slots included."""
    slots = [name for kind in type(owner).__mro__ for name in _as_tuple(vars(kind).get("__slots__", ()))]
    found = {name: getattr(owner, name) for name in slots if not name.startswith("__") and hasattr(owner, name)}
    return found | getattr(owner, "__dict__", {})


def _as_tuple(names: Any) -> Iterable[str]:
    return (names,) if isinstance(names, str) else names


def _is_state(value: Any) -> bool:
    """Whether an attribute with this value is put back when it has been given another one."""
    if isinstance(value, Tensor):
        return not value.requires_grad
    numpy: Any = sys.modules.get("numpy")
    is_number_or_array = numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic))
    return isinstance(value, (*_VALUES, *_CONTAINERS)) or is_number_or_array or _is_own(value)


def _is_own(value: Any) -> bool:
    """Whether an object is one in which a loss may keep state: of the user's code, or of a library, but like a metric."""
    kind = type(value)
    if isinstance(value, (*_OTHERS, nn.Module)):
        return False
    return isinstance(value, SimpleNamespace) or _is_own_kind(kind)  # type: ignore[arg-type]


@functools.cache
def _is_own_kind(kind: Any) -> bool:
    root = kind.__module__.partition(".")[0]
    if root in _LIBRARIES or (root in sys.stdlib_module_names and root != "__main__"):
        return False
    is_installed = "site-packages" in str(getattr(sys.modules.get(root), "__file__", ""))
    return not is_installed or is_dataclass(kind) or callable(getattr(kind, "update", None))


def _worth_visiting(module: nn.Module) -> list[str]:
    """Names of attributes that may hold state in which something changes in place; looked for when there are new ones."""
    attributes = vars(module)
    size, names = _looked_at.get(module, (0, []))
    if size != len(attributes):
        kinds = (Tensor, *_CONTAINERS) if type(module).__module__.partition(".")[0] not in ("torch", "peft") else ()
        names = [
            name
            for name, value in attributes.items()
            if name not in _OF_MODULES
            and not name.startswith(_OF_DEEPSPEED)
            and _is_state(value)
            and (isinstance(value, kinds) or not isinstance(value, (*_VALUES, Tensor, *_CONTAINERS)))
        ]
        _looked_at[module] = (len(attributes), names)
    return names
