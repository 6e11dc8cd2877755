"""Refuses steps whose gradients something else uses or has used.

Each error gives the reason and a way out.
"""

from collections.abc import Sequence
from typing import NoReturn

from torch import Tensor


class NoSecondGradient(RuntimeError):
    """The last pass left no gradient."""

    def __init__(self) -> None:
        super().__init__(
            "The second call of the closure left no gradient on any regularized parameter, the first one "
            "did. Let the closure clear the gradients and run forward and backward each time it is called."
        )


def refuse_foreign(trainable: Sequence[Tensor], moved: Sequence[Tensor]) -> None:
    """Raise if hooks of the first backward stepped ``trainable`` weights or took their gradients.

    Hooks alone prove nothing, nor do weights that have ``moved``: an embedding with ``max_norm`` writes them
    in its forward, a codebook too.
    """
    is_gone = all(parameter.grad is None for parameter in trainable)
    if any(map(_is_stepped_by_hook, moved)) or (is_gone and (moved or any(map(_has_hooks, trainable)))):
        raise RuntimeError(
            "The first backward has used up its gradients: an optimizer steps in the backward, or hooks take "
            "the gradients away (layerwise or fused optimizers, gradient release). Nothing is left to "
            "combine a second gradient with. Remove these hooks, and let the optimizer inside "
            "GradRegOptimizer take the steps."
        )


def _is_stepped_by_hook(parameter: Tensor) -> bool:
    """Whether hooks could have moved a parameter that has moved; hooks that mask a gradient keep it."""
    has_own = bool(parameter._post_accumulate_grad_hooks) or hasattr(parameter, "_in_backward_optimizers")
    return has_own or (parameter.grad is None and _has_hooks(parameter))


def _has_hooks(parameter: Tensor) -> bool:
    return bool(parameter._post_accumulate_grad_hooks or parameter._backward_hooks)


def refuse_shared() -> NoReturn:
    """Raise because other processes write the weights."""
    raise RuntimeError(
        "The parameters are in memory that processes share (share_memory(), Hogwild): the others would "
        "compute at θ', and what they write while this one is there is lost when θ comes back. Give each "
        "process a copy of its own and average the gradients (torch.nn.parallel.DistributedDataParallel)."
    )


def refuse_meta(trainable: Sequence[Tensor]) -> NoReturn:
    """Raise because there are parameters without values."""
    count = sum(parameter.is_meta for parameter in trainable)
    raise RuntimeError(
        f"{count} of {len(trainable)} parameters are on the meta device: without values nothing moves to θ'. "
        "Load the weights, or call model.to_empty(device=...) and initialize them, before the first step."
    )


def refuse_refilled() -> NoReturn:
    """Raise because g1 has been written over."""
    raise RuntimeError(
        "The last pass wrote its gradients into the memory of those of the first pass, which are lost: "
        "gradients at a fixed address, as CUDA graphs and static buffers have. Give every pass gradients of "
        "its own: p.grad = static.clone()."
    )


def refuse_unscaled() -> NoReturn:
    """Raise because the first gradient has lost its scale, which the second would have."""
    raise RuntimeError(
        "scaler.unscale_(optimizer) was called within a pass: all gradients of a step need one scale, "
        "and a clip of each would bias their difference. Run forward and backward in `for _ in "
        "optimizer.passes():`, and after the loop call scaler.unscale_(optimizer), clip, "
        "optimizer.step() and scaler.update()."
    )
