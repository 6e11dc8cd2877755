"""Refuses gradients of a step that its second pass would lack: those of backwards that ``training_step`` runs by itself.

Adversarial training (FGM, PGD), contrastive or auxiliary terms are often written so. A backward inside ``compute_loss`` is
repeated with it, and ``accelerator.backward`` is recorded; one that reaches no parameter of the optimizer does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from gradreg_optim.trainers.micro_batches import not_repeatable
from gradreg_optim.trainers.patches import Patches


class OtherBackwards:
    """Watches ``torch.autograd.backward``, which every backward in Python calls, while ``training_step`` runs."""

    def __init__(self, trainer: Any, optimizer: Callable[[], Any]) -> None:
        """``optimizer`` returns the wrapper, or ``None`` while the step to come has no second pass."""
        self._trainer = trainer
        self._optimizer = optimizer
        self._are_allowed = False

    def refused(self) -> Patches:
        """Around ``training_step``: raise before such a backward runs."""
        return Patches().answer(torch.autograd, "backward", self._check)

    def allowed(self) -> Patches:
        """Around what is repeated."""
        return Patches().set(self, "_are_allowed", True)

    def _check(self, backward: Callable[..., Any], tensors: Any, *args: Any, **kwargs: Any) -> Any:
        if not self._are_allowed and (optimizer := self._optimizer()) is not None:
            inputs = kwargs.get("inputs", args[4] if len(args) > 4 else None)
            starts = [tensors] if isinstance(tensors, Tensor) else list(tensors)
            leaves = _leaves(starts) if inputs is None else [inputs] if isinstance(inputs, Tensor) else inputs
            known = {
                id(parameter) for group in optimizer._groups_with_names() for parameter in group["params"]
            }
            is_fsdp = isinstance(
                self._trainer.model_wrapped, FSDPModule
            )  # in whose graph other parameters are whole ones
            if any(id(leaf) in known or (is_fsdp and isinstance(leaf, nn.Parameter)) for leaf in leaves):
                raise not_repeatable(self._trainer, "training_step ran a backward besides compute_loss's")
        return backward(tensors, *args, **kwargs)


def _leaves(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The tensors into which a backward from ``tensors`` accumulates gradients."""
    nodes: list[Any] = [tensor.grad_fn for tensor in tensors]
    yield from (tensor for tensor, node in zip(tensors, nodes, strict=True) if node is None)
    seen = set(nodes)
    for node in nodes:  # the loop appends to it
        if node is None:
            continue
        if hasattr(node, "variable"):
            yield node.variable
        new = {following for following, _ in node.next_functions} - seen
        seen |= new
        nodes += new
