"""Engines over several ranks under which a step would be wrong although each of its parts runs.

Looked for in the first two steps, since engines come after the optimizer, and hooks fill their buffers while they run.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

LOOKS = 2


class EngineCheck:
    """Refuses engines, and warns of those that it does not know, in the first steps of one optimizer."""

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._warned_of: set[str] = set()

    def __call__(self, groups: list[dict[str, Any]], step: int) -> None:
        """Look at what holds the parameters of ``groups``, unless this step has been looked at, or enough others."""
        if len(self._steps) == LOOKS or step in self._steps or not any(group["gradreg_strength"] for group in groups):
            return
        parameters = [parameter for group in groups for parameter in group["params"]]
        _check_shards(parameters)
        for message in _communication_problems(parameters):
            if message not in self._warned_of:
                self._warned_of.add(message)
                warnings.warn(message, stacklevel=3)
        self._steps.append(step)


def _check_shards(parameters: list[Tensor]) -> None:
    """Refuse parameters that FSDP1 has flattened and sharded: nothing on them says which process group holds the rest."""
    flattened = {id(parameter) for parameter in parameters if getattr(parameter, "_fsdp_flattened", False)}
    if not flattened:
        return
    from torch.distributed.fsdp._flat_param import FlatParamHandle  # private, and imported already by whoever flattened them

    for handle in _living(FlatParamHandle):
        held = (handle.flat_param, *(getattr(handle.flat_param, "_params", None) or ()))
        if handle.uses_sharded_strategy and not flattened.isdisjoint(map(id, held)):
            raise ValueError(
                "the parameters are shards of FSDP1 (FullyShardedDataParallel): norms would be those of this rank's shards "
                "alone. Use FSDP2 (torch.distributed.fsdp.fully_shard; fsdp_version=2 in Accelerate and Transformers)."
            )


def _communication_problems(parameters: list[Tensor]) -> Iterator[str]:
    """What there is to say about the hooks with which DistributedDataParallel sends the gradients of ``parameters``."""
    known = set(map(id, parameters))
    for model in _living(DistributedDataParallel):
        if not any(id(parameter) in known for parameter in model.parameters()):
            continue
        for hook, state in getattr(model, "_comm_hooks", ()):
            name = getattr(hook, "__qualname__", type(hook).__name__)
            if any(cls.__name__ == "PowerSGDState" for cls in type(state).__mro__):
                raise ValueError(
                    f"the communication hook {name!r} (PowerSGD) compresses gradients and adds what it lost to the next "
                    "ones: g2 − g1 would be that error. Use DistributedDataParallel without it, or with fp16_compress_hook "
                    "or bf16_compress_hook."
                )
            bound = [getattr(hook, name, None) for name in ("__self__", "args", "keywords")]  # of methods, of partials
            cells = [cell.cell_contents for cell in getattr(hook, "__closure__", None) or ()]
            if _holds_tensors([state, hook, bound, cells]):
                yield (
                    f"The communication hook {name!r} keeps tensors from one backward to the next. If it adds to gradients "
                    "what it lost of earlier ones (error feedback), g2 − g1 is that error instead of curvature. Use a hook "
                    "without memory, such as bf16_compress_hook."
                )


def _holds_tensors(value: Any, depth: int = 4) -> bool:
    """Whether there are tensors in ``value``, its containers and attributes; models and optimizers have their own."""
    if isinstance(value, Tensor):
        return not isinstance(value, nn.Parameter)
    if depth == 0 or isinstance(value, (nn.Module, Optimizer, type)):
        return False
    within = value if isinstance(value, (list, tuple, set, dict)) else getattr(value, "__dict__", {})
    return any(_holds_tensors(item, depth - 1) for item in (within.values() if isinstance(within, dict) else within))


def _living(cls: type) -> Iterator[Any]:
    """Every object of that class: neither parameters nor reducers know who holds them."""
    return (entry for entry in gc.get_objects() if issubclass(type(entry), cls))
