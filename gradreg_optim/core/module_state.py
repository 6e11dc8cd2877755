"""What modules hold beside their weights, put back for further passes.

A training forward writes running statistics, the vectors of spectral norms, momentum encoders, codebooks and
counters. Each further pass starts from their values before the first one, and the step ends with those that
the first one left. Whatever else differs between the passes, the witnesses see
(:mod:`gradreg_optim.core.witnesses`).
"""

import sys
import warnings
import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from gradreg_optim.core.local import detached_from_bucket, local_shard
from gradreg_optim.core.multi_tensor import sampled
from gradreg_optim.core.step import OfOneOptimizer
from gradreg_optim.core.tensors import differ

SMALL = 2**20
"""Bytes up to which a frozen parameter is copied before it is known to move; of larger ones a sample is."""

_NOTHING: Any = object()  # in place of an attribute that did not exist
_PLAIN = (type(None), bool, int, float, str)
_ENGINES = ("torch.nn.parallel", "torch.distributed", "torch._dynamo", "deepspeed", "accelerate")
# Attributes of ZeRO-3.
_OF_DEEPSPEED = ("ds_", "_ds_", "applied_pre_backward_ref_cnt", "_original_parameters", "_external_params")


@dataclass
class _Value:
    """A tensor in one step, and its values before the first pass, perhaps of a sample, and after it."""

    tensor: Tensor
    version: int
    address: int
    before: Tensor | None = None
    is_sample: bool = False
    after: Tensor | None = None

    def has_moved(self, is_new: bool) -> bool:
        """Whether the first pass wrote it; new ones are compared: ``.data`` and BatchNorm leave no mark."""
        if self.version != self.tensor._version or self.address != self.tensor.data_ptr():
            return True
        now = sampled(self.tensor.detach()) if self.is_sample else self.tensor
        return is_new and self.before is not None and differ(now, self.before)


class ModuleState(OfOneOptimizer):
    """What the ``modules`` that run in a step hold beside their weights.

    That is buffers, frozen parameters, and tensors and plain numbers in attributes; also the plain
    numbers of DistributedDataParallel's communication hooks, and gradients of parameters that the
    optimizer does not own.

    Memory: two copies of what moves. When a module first runs in its present mode, all its buffers and small
    frozen parameters are copied and compared, which waits for the device. Later ``_version`` tells what
    begins to move; the step in which it does repeats it from its moved value.
    """

    def __init__(self) -> None:
        # By module and mode (``training``): whether each tensor that was seen in it moves.
        self._known: weakref.WeakKeyDictionary[nn.Module, dict[bool, dict[str, bool]]] = (
            weakref.WeakKeyDictionary()
        )
        self._compiled: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._owned: set[int] = set()
        self.modules: dict[nn.Module, dict[str, _Value]] = {}  # one object for good: the losses hold it
        self.forget()

    def forget(self) -> None:
        """Forget the step."""
        self.modules.clear()
        self._stores: list[tuple[dict[str, Any], dict[str, Any]]] = []  # dicts of modules, and what they held
        self._values: dict[int, _Value] = {}  # by the ``id`` of the tensor
        self._changed: list[tuple[dict[str, Any], str, Any, Any]] = []
        # States of communication hooks, and their numbers before and after the first pass.
        self._hook_states: list[tuple[Any, dict[str, Any], dict[str, Any]]] = []
        self._foreign: list[tuple[Tensor, Tensor | None]] = []
        # By the ``id`` of a module: it and its buffers, if compiled code has noted them; ``None``
        # if it was looked at.
        self._traced: dict[int, tuple[nn.Module, list[tuple[Tensor, Tensor]]] | None] = {}

    # The first pass.

    def begin_first(self, model: nn.Module | None, finding: ExitStack) -> None:
        """Begin the first pass: look at ``model`` now, and at other modules when the block calls them."""
        self.begin(model)
        if "torch._dynamo" in sys.modules:
            # A compiled module warns that hooks are called on its wrapper too: ``look`` looks
            # once at each module.
            finding.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", r"Using `torch\.compile\(module\)` when there are global hooks")
        finding.callback(register_module_forward_pre_hook(self.look).remove)

    def begin(self, *models: nn.Module | None) -> None:
        """Forget the last step, and look at ``models`` and at what compiled code called in it."""
        self.forget()
        for model in (*models, *self._compiled):
            if model is not None:
                self.look(model)

    def own(self, parameters: Iterable[Tensor]) -> None:
        """Leave ``parameters`` and their gradients alone: they are the optimizer's."""
        self._owned = {id(parameter) for parameter in parameters}

    def look(self, module: nn.Module, _inputs: object = None) -> None:
        """Note the values of ``module`` and its submodules, whose hooks a compiled module does not call."""
        if id(module) not in self._traced:
            (self._trace if torch.compiler.is_compiling() else self._look_below)(module)

    # Where code is compiled in parts, this runs between them.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _look_below(self, module: nn.Module) -> None:
        with torch.no_grad(), torch._C._DisableFuncTorch():
            todo: list[nn.Module | None] = [module]
            while todo:
                part = todo.pop()
                if part is not None and id(part) not in self._traced:
                    self._traced[id(part)] = None
                    self._look_at(part)
                    todo += part._modules.values()

    def _trace(self, module: nn.Module) -> None:
        """Compiled into the code that calls ``module``: note all of its buffers."""
        for part in module.modules():
            if id(part) not in self._traced:
                self._traced[id(part)] = (
                    part,
                    [(buffer, buffer.clone()) for buffer in part.buffers(recurse=False)],
                )

    def _look_at(self, part: nn.Module) -> None:
        known, values = self._known_of(part), dict[str, _Value]()
        own: list[dict[str, Any]] = [part._buffers, part._parameters]
        own += [] if type(part).__module__.startswith(_ENGINES) else [vars(part)]
        # Not dict(store): that reads the items of a parameter dict of ZeRO-3 one by one, which gathers them.
        self._stores += [(store, dict(store.items())) for store in own]
        for name, held in (item for store in own for item in store.items() if isinstance(item[1], Tensor)):
            tensor = (
                None if held.requires_grad or held._is_view() or id(held) in self._owned else writable(held)
            )
            if tensor is not None and id(tensor) not in self._values:
                values[name] = self._values[id(tensor)] = self._noted(tensor, name, known)
        if isinstance(part, DistributedDataParallel):
            self._hook_states += [
                (state, _numbers_of(state), {}) for _, state in getattr(part, "_comm_hooks", ())
            ]
        self.modules[part] = values

    def _noted(self, tensor: Tensor, name: str, known: dict[str, bool]) -> _Value:
        is_large = isinstance(tensor, nn.Parameter) and tensor.nbytes > SMALL
        is_sample = is_large and not known.get(name, False)
        seen = sampled(tensor.detach()) if is_sample else tensor.detach()
        before = seen.clone() if known.get(name, True) else None
        return _Value(tensor, tensor._version, tensor.data_ptr(), before, is_sample)

    def _known_of(self, part: nn.Module) -> dict[str, bool]:
        return self._known.setdefault(part, {}).setdefault(part.training, {})

    def end(self) -> None:
        """The first pass has ended: find out what moved."""
        with torch.no_grad(), torch._C._DisableFuncTorch():
            for part, noted in (entry for entry in self._traced.values() if entry is not None):
                self._compiled.add(part)
                found = {id(b): _Value(b, b._version, b.data_ptr(), copy) for b, copy in noted}
                self._values |= found
                self.modules[part] = {
                    name: found[id(b)] for name, b in part._buffers.items() if id(b) in found
                }
            for store, state in self._stores:
                self._compare(store, state)
            for hook_state, _, after in self._hook_states:
                after.update(_numbers_of(hook_state))
            for part, values in self.modules.items():
                known = self._known_of(part)
                for name, value in values.items():
                    known[name] = known.get(name, False) or value.has_moved(name not in known)
                    if known[name] and value.before is not None and not value.is_sample:
                        value.after = value.tensor.detach().clone()
            self._put_aside(self.modules)

    def _compare(self, store: dict[str, Any], state: dict[str, Any]) -> None:
        """Note which names refer to something else than before, and go on from there in further passes."""
        if len(store) != len(state) or not all(map(is_, store.values(), state.values())):
            for name in {**state, **store}:
                before, after = state.get(name, _NOTHING), store.get(name, _NOTHING)
                is_ours = before is not after and not name.startswith(_OF_DEEPSPEED)
                if is_ours and _is_state(before) and _is_state(after):
                    self._changed.append((store, name, before, after))

    def _put_aside(self, modules: Iterable[nn.Module]) -> None:
        """Note the gradients of the first pass on parameters of other optimizers, which step on them."""
        for parameter in (p for part in modules for p in part._parameters.values() if p is not None):
            if self._owned and parameter.requires_grad and id(parameter) not in self._owned:
                parameter.grad = detached_from_bucket(parameter.grad)
                self._foreign.append((parameter, parameter.grad))

    # Further passes.

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """Run the block from the values before the first pass; afterwards put back those after it."""
        try:
            self.put(is_before=True)
            yield
        finally:
            self.put(is_before=False)

    def put(self, *, is_before: bool) -> None:
        """Put back the values before the first pass, or after it."""
        with torch.no_grad(), torch._C._DisableFuncTorch():
            for store, name, before, after in self._changed:
                held = before if is_before else after
                if held is _NOTHING:
                    store.pop(name, None)
                else:
                    store[name] = held
            for value in self._values.values():
                if value.before is not None and value.after is not None:
                    _write_(value.tensor, value.before if is_before else value.after)
            for hook_state, *values in self._hook_states:
                for name, held in values[0 if is_before else 1].items():
                    setattr(hook_state, name, held)
            for parameter, gradient in self._foreign:
                parameter.grad = None if is_before else gradient


def _numbers_of(hook_state: Any) -> dict[str, Any]:
    """The plain numbers of the state of a communication hook, by which it counts backwards."""
    names = [*getattr(hook_state, "__dict__", ()), *getattr(hook_state, "__slots__", ())]
    return {
        name: value for name in names if type(value := getattr(hook_state, name, _NOTHING)) in (int, float)
    }


def is_wrapped(value: Any) -> bool:
    """Whether a transform of ``torch.func`` put ``value`` in place of another tensor."""
    return isinstance(value, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value)


def writable(value: Tensor) -> Tensor | None:
    """The plain local tensor that holds the numbers of ``value``; ``None`` if there is no such tensor."""
    while is_wrapped(value):
        value = torch._C._functorch.get_unwrapped(value)
    tensor = local_shard(value)
    is_plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    if not is_plain or tensor.is_quantized or tensor.device.type == "meta" or tensor.is_inference():
        return None
    # Where elements share memory, nothing writes them in place.
    axes = zip(tensor.stride(), tensor.shape, strict=True)
    return None if any(step == 0 and size > 1 for step, size in axes) else tensor


def _is_state(value: Any) -> bool:
    """Whether an attribute with this value is put back: activations and tensors of torch.func are not."""
    if isinstance(value, Tensor):
        return not value.requires_grad and not value._is_view() and not is_wrapped(value)
    return value is _NOTHING or type(value) in _PLAIN


def _write_(tensor: Tensor, value: Tensor) -> None:
    """Write ``value`` into ``tensor``, which an observer may have resized."""
    if tensor.shape == value.shape and tensor.dtype == value.dtype:
        tensor.copy_(value)
    else:
        tensor.data = value.to(tensor.device, copy=True)
