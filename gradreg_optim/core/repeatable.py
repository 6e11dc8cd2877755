"""Makes a pass repeatable: it starts from the same random numbers and buffers, and from no gradients.

Both gradients have to see the same dropout masks: otherwise (g2 − g1)/ε measures dropout noise divided by ε. So it is with
what a training forward writes: running statistics, the vectors of spectral norms, codebooks, observers, counters. Each
further pass starts from their values before the first one, and the step ends with those that the first one left.

What moves is found out when a module first runs in its present mode (``training``): all its buffers are copied, and compared
after the pass by value, because writes through ``.data`` and those of BatchNorm leave no mark in ``_version``. From then on
those that moved are copied in each step. Of others that are small a copy is kept, in case that their ``_version`` changes.
"""

from __future__ import annotations

import random
import sys
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from gradreg_optim.core.losses import Losses
from gradreg_optim.core.step import Point
from gradreg_optim.core.values import (
    NOTHING,
    Held,
    Known,
    copied,
    differ,
    is_of_tensors,
    names_of,
    refer,
    warn_of_late,
    writable,
    write_,
)

SMALL = 2**22
"""Bytes up to which a copy of a buffer is kept although the buffer does not move."""


def same_start(
    devices: Iterable[torch.device],
    model: nn.Module | None,
    buffers: Buffers,
    losses: Losses | None,
    first: AbstractContextManager[None],
) -> Callable[[Point], AbstractContextManager[None]]:
    """What is around each pass of one step: all start where the first did, and all but the first leave things as they were.

    ``devices`` are those whose random numbers a loss may draw. ``model`` is a module whose parts run; others are found when
    they are called. ``losses`` notes the losses of all passes. ``first`` is what else is around the first pass.
    """
    noted: Callable[[], AbstractContextManager[None]] = nullcontext if losses is None else losses.noted
    start = RandomState(devices)

    @contextmanager
    def around(point: Point) -> Iterator[None]:
        is_first = point is Point.THETA
        with first if is_first else start.replayed(), buffers.first(model) if is_first else buffers.repeated(), noted():
            yield

    return around


class RandomState:
    """The state of every generator a loss may draw from: Python's, NumPy's (if loaded), torch's on CPU and devices."""

    def __init__(self, devices: Iterable[torch.device] = ()) -> None:
        """Record the generators of the host and of ``devices``."""
        self._devices = {device for device in devices if device.type not in ("cpu", "meta")}
        states: list[tuple[Callable[[Any], object], object]] = [
            (random.setstate, random.getstate()),
            (torch.set_rng_state, torch.get_rng_state()),
        ]
        if "numpy" in sys.modules:
            of_numpy = sys.modules["numpy"].random
            states.append((of_numpy.set_state, of_numpy.get_state()))
        for device in self._devices:
            module = torch.get_device_module(device)
            states.append((partial(module.set_rng_state, device=device), module.get_rng_state(device)))
        self._restorers = [partial(restore, state) for restore, state in states]

    def restore(self) -> None:
        """Put every generator back to the recorded state."""
        for restore in self._restorers:
            restore()

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Run the block from the recorded state; afterwards the generators stand where they stood before it."""
        after = RandomState(self._devices)
        self.restore()
        try:
            yield
        finally:
            after.restore()


class Buffers:
    """The buffers of all ``modules`` that run in a step, and what is known of them from earlier steps.

    Tensors in plain attributes of a module are treated like its buffers if they move in the first step. Memory: two copies
    of what moves, and one of what is small.
    """

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[nn.Module, dict[bool, Known]] = weakref.WeakKeyDictionary()
        self._compiled: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # modules that compiled code has noted
        # What is known of a module in the mode in which it was looked at, and what its names referred to.
        self.modules: dict[nn.Module, tuple[Known, dict[str, Any]]] = {}
        self._forget()

    def __reduce__(self) -> Any:
        """A copy of the optimizer has modules of its own to look at."""
        return Buffers, ()

    def _forget(self) -> None:
        self.modules.clear()
        # Names that refer to something else after the pass: the module, its dict, the name, before and after.
        self._changed: list[tuple[nn.Module, dict[str, Any], str, Any, Any]] = []
        self._held: dict[int, Held] = {}  # by the ``id`` of the tensor
        # By the ``id`` of a module: it and its buffers, if compiled code has noted them; ``None`` if it was looked at.
        self._traced: dict[int, tuple[nn.Module, list[tuple[Tensor, Tensor]]] | None] = {}

    # The first pass.

    @contextmanager
    def first(self, model: nn.Module | None) -> Iterator[None]:
        """Run the block, which is the first pass. ``model`` is looked at in advance, other modules when they are called."""
        self.begin(model)
        with ExitStack() as finding:
            if "torch._dynamo" in sys.modules:
                # A compiled module warns that hooks are called on its wrapper too: ``look`` looks once at each module.
                finding.enter_context(warnings.catch_warnings())
                warnings.filterwarnings("ignore", r"Using `torch\.compile\(module\)` when there are global hooks")
            finding.callback(register_module_forward_pre_hook(self.look).remove)
            yield
        self.end()

    def begin(self, *models: nn.Module | None) -> None:
        """Forget the last step, and look at ``models`` and at what compiled code called in it."""
        self._forget()
        for model in (*models, *self._compiled):
            if model is not None:
                self.look(model)

    def look(self, module: nn.Module, _inputs: object = None) -> None:
        """Note the values of ``module`` and of everything below it: a compiled module calls no hooks of its parts."""
        if id(module) not in self._traced:
            (self._trace if torch.compiler.is_compiling() else self._look_below)(module)

    @torch._disable_dynamo  # type: ignore[attr-defined]  # where code is compiled in parts, this runs between them
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
                self._traced[id(part)] = part, [(buffer, buffer.clone()) for buffer in part.buffers(recurse=False)]

    def _look_at(self, part: nn.Module) -> None:
        known = self._known_of(part)
        names = names_of(part, known) if known.is_new or known.moving or part._buffers else {}
        self.modules[part] = known, names
        for name, value in names.items():
            tensor = writable(value)
            if tensor is None or id(tensor) in self._held:
                continue
            is_small = tensor.nbytes <= SMALL
            # Where something moves, all that is small counts as moving: it may be updated now and then.
            moves = None if known.is_new else name in known.moving or (is_small and bool(known.moving))
            held = self._held[id(tensor)] = Held(tensor, tensor._version, moves)
            kept = known.kept.get(name)
            if kept is not None and kept.tensor is tensor and kept.version == tensor._version:
                held.before = kept.before
            elif moves is not False or is_small:
                held.before = copied(tensor, is_sure=moves is True)

    def _known_of(self, part: nn.Module) -> Known:
        return self._known.setdefault(part, defaultdict(Known))[part.training]

    def end(self) -> None:
        """The first pass has ended: find out what moved."""
        with torch.no_grad(), torch._C._DisableFuncTorch():
            for part, noted in (entry for entry in self._traced.values() if entry is not None):
                self._compiled.add(part)
                known = self._known_of(part)
                known.is_new = False
                self.modules[part] = known, dict(part._buffers)
                self._held |= {id(buffer): Held(buffer, buffer._version, None, copy) for buffer, copy in noted}
            for held in self._held.values():
                if held.moves is None:
                    held.moves = held.before is not None and differ(held.tensor, held.before)
            for part, (known, names) in self.modules.items():
                if names or known.is_new or part._buffers:
                    self._learn(part, known, names)
                    known.is_new = False
            for held in self._held.values():
                if held.moves:
                    held.after = copied(held.tensor, is_sure=True)
                else:
                    held.before = None

    def _learn(self, part: nn.Module, known: Known, names: dict[str, Any]) -> None:
        now, held = names_of(part, known), {}
        stores = {name: vars(part) if name in vars(part) else part._buffers for name in {**names, **now}}
        for name, store in stores.items():
            before, after = names.get(name, NOTHING), now.get(name, NOTHING)
            if before is not after and is_of_tensors(before, after):
                self._changed.append((part, store, name, before, after))
                known.moving.add(name)
            of_name = self._held.get(id(writable(before)))
            if of_name is not None:
                held[name] = of_name
        for name, of_name in held.items():
            if not of_name.moves and of_name.version != of_name.tensor._version:  # it has begun to move, unless it is new
                of_name.moves = not known.is_new and name not in known.silent
                (known.silent if not of_name.moves else known.moving).add(name)
                if of_name.moves and of_name.before is None:
                    warn_of_late(name, of_name.tensor)
            elif of_name.moves:
                known.moving.add(name)
        for name, of_name in held.items():
            if of_name.tensor.nbytes <= SMALL:
                of_name.moves = of_name.moves or bool(known.moving)
                if not of_name.moves:
                    known.kept[name] = Held(of_name.tensor, of_name.tensor._version, False, of_name.before)

    # Further passes.

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """Run the block, which is a further pass: from the values before the first pass; afterwards those that it left."""
        try:
            self._put(is_before=True)
            yield
        finally:
            self._put(is_before=False)

    def _put(self, *, is_before: bool) -> None:
        with torch.no_grad(), torch._C._DisableFuncTorch():
            for _, store, name, before, after in self._changed:
                refer(store, name, before if is_before else after)
            for held in self._held.values():
                value = held.before if is_before else held.after
                if held.moves and value is not None:
                    write_(held.tensor, value)

    def mark(self) -> Callable[[], None]:
        """In the first pass: note the values at this moment; returns a function that lets a further pass go on from them."""
        names = {part: names_of(part, known) for part, (known, _) in self.modules.items()}
        with torch.no_grad(), torch._C._DisableFuncTorch():
            for value in (value for values in names.values() for value in values.values()):
                tensor = writable(value)
                if tensor is not None and id(tensor) not in self._held:  # it took the place of another in this pass
                    self._held[id(tensor)] = Held(tensor, tensor._version, True, copied(tensor, is_sure=True))
            noted = [(h.tensor, copied(h.tensor, is_sure=True)) for h in self._held.values() if h.moves is not False]

        def go_on() -> None:
            with torch.no_grad(), torch._C._DisableFuncTorch():
                for part, store, name, *_ in self._changed:
                    if part in names:
                        refer(store, name, names[part].get(name, NOTHING))
                for tensor, value in noted:
                    if self._held[id(tensor)].moves:
                        write_(tensor, value)

        return go_on
