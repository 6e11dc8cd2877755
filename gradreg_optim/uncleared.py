"""Does a closure clear the gradients that it finds?

One that does not adds to what earlier backward passes left (Lightning's, with ``accumulate_grad_batches``). The first
gradient would hold all of a step's micro-batches then, and the second one only those of the closure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from gradreg_optim.gradients import real

__all__ = ["called_on_marked_gradient"]


def called_on_marked_gradient(closure: Callable[[], Any], parameters: Iterable[Tensor]) -> tuple[Any, bool]:
    """Call ``closure`` once, after overwriting one gradient with a number that no backward pass makes up for.

    Returns:
        What ``closure`` returned, and whether there was a gradient to mark: without one, nothing is known.

    Raises:
        RuntimeError: the mark is still there; the gradient is what it was before the call.
    """
    parameters = [p for p in parameters if p.requires_grad]  # a gradient that is left on a frozen one stays there
    found = [p.grad for p in parameters if p.grad is not None and p.grad.layout is torch.strided]
    gradient = next((grad for grad in sorted(found, key=Tensor.numel) if bool(real(grad).any())), None)
    if gradient is None:
        return closure(), False
    marked = real(gradient)
    before, mark = marked.clone(), torch.finfo(marked.dtype).max / 4
    marked.fill_(mark)
    was_cleared = True
    try:
        result = closure()
    finally:
        if any(p.grad is gradient for p in parameters) and bool((marked > mark / 2).all()):
            marked.copy_(before)
            was_cleared = False
    if not was_cleared:
        raise RuntimeError(
            "The closure added to gradients from before it was called: its second call would lack them. Clear gradients in "
            "the closure and run all micro-batches of the step in it (in Lightning, by manual optimization instead of "
            "accumulate_grad_batches)."
        )
    return result, True
