"""The scheme ``"exact"``: Δ = H·d itself, by differentiating twice, for models that allow it.

    s = ⟨∇L, d⟩        ∇s = H·d        (Pearlmutter 1994; Karakida et al. 2023 call it double backpropagation)

The closure does not change. While it runs, its ``backward`` adds ∇s to ``.grad`` in place of ∇L. Each micro-batch adds its
own ∇s, and DistributedDataParallel averages ∇s as it averages gradients, in the same hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradreg_optim.core.finite_difference import clip_first_, is_finite, item_on_cpu, moments_of_delta, summed
from gradreg_optim.core.losses import backward_replaced
from gradreg_optim.core.plan import Plan, Scheme
from gradreg_optim.core.step import Difference, FirstGradient, GroupGradients, Point, Scalar
from gradreg_optim.core.storage import Storage

_REFUSALS = (
    "derivative for",  # fused attention and other kernels that have no second derivative
    "does not currently support double backward",  # torch.compile
    "donated buffers",  # torch.compile too
    "don't support automatic differentiation",  # backwards that write into buffers
    "trying to differentiate twice",  # once_differentiable functions
)


def exact(model: nn.Module | None) -> Scheme:
    """The scheme, with a model to name in error messages. No step, no ε, and none of their figures."""
    points = (Point.TWICE,)
    return Scheme(points, points, at=partial(stand_at, model=model), difference=product, weight=weight_of)


def stand_at(
    storage: Storage, first: FirstGradient, _point: Point, _plan: Plan, *, model: nn.Module | None
) -> AbstractContextManager[None]:
    """Let backward passes inside the block collect H·d."""
    parameters, direction = storage.leaves(first)
    return hessian_products(parameters, direction, scale=first.clip / storage.loss_scale, model=model)


def product(storage: Storage, first: FirstGradient, _plan: Plan) -> Difference:
    """Measure H·d."""
    clip_first_(first)
    delta = first.further.pop(Point.TWICE)
    inner, squares, _ = summed(storage, first, moments_of_delta(first, delta))
    return Difference(inner, squares, delta, is_delta=True, is_finite=item_on_cpu(is_finite(squares.sum())))


def weight_of(group: GroupGradients) -> Scalar:
    """γ."""
    return group.strength


@contextmanager
def hessian_products(
    parameters: Sequence[Tensor], direction: Sequence[Tensor], *, scale: Scalar = 1.0, model: nn.Module | None = None
) -> Iterator[None]:
    """Inside the block, ``backward`` adds H·(scale·d) to ``.grad`` of its ``inputs``, or of all that the loss depends on.

    ``direction`` is d, with the shapes of ``parameters``. PyTorch's own fused attention is replaced by its mathematical
    form, which can be differentiated twice. Error messages name the attention implementation of ``model``.
    """
    unreached = {id(parameter) for parameter in parameters}
    with_graph: list[bool] = []  # of each backward so far

    def twice(
        backward: Callable[..., None],
        tensors: Any,
        grad_tensors: Any = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        grad_variables: Any = None,
        inputs: Any = None,
    ) -> None:
        if any(with_graph):
            raise RuntimeError(
                "method='exact': the closure calls backward() after a backward(create_graph=True), so its loss may depend "
                "on gradients in .grad, which hold H·d in this pass. Compute a loss of gradients from "
                "torch.autograd.grad(loss, parameters, create_graph=True), or use method='central' or 'forward'."
            )
        with_graph.append(create_graph)
        if grad_tensors is None:
            grad_tensors = grad_variables  # its old name
        with torch.enable_grad():
            try:
                gradients = torch.autograd.grad(
                    tensors, list(parameters), grad_outputs=grad_tensors, create_graph=True, allow_unused=True
                )
                # A parameter that ∇s does not reach gets a zero: hooks such as DDP's wait for every one of them.
                product = sum((parameter.real.sum() * 0 for parameter in parameters), torch.zeros(()))
                for parameter, gradient, along in zip(parameters, gradients, direction, strict=True):
                    if gradient is not None:
                        unreached.discard(id(parameter))
                    if gradient is not None and gradient.requires_grad:
                        product = product + (_flat(gradient) * (_flat(along.detach()) * scale)).sum()
                # Whoever needs the graph again, or a gradient with a graph, gets it.
                backward(product, retain_graph=retain_graph, create_graph=create_graph, inputs=inputs)
            except RuntimeError as error:
                raise _explained(error, model) from error.__cause__

    with backward_replaced(twice), sdpa_kernel(SDPBackend.MATH):
        yield
    if unreached:
        raise RuntimeError(
            f"method='exact': {len(unreached)} of {len(parameters)} parameters that had a gradient had none that can be "
            "differentiated again: reentrant gradient checkpointing hides them. Set use_reentrant=False "
            "(gradient_checkpointing_kwargs={'use_reentrant': False} in a trainer), or use method='central'."
        )


def _flat(tensor: Tensor) -> Tensor:
    """Real numbers, in single precision at least, in which the product is summed."""
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _explained(error: RuntimeError, model: nn.Module | None) -> RuntimeError:
    """What the user can do about it, if it is a second derivative that is missing; else the error itself."""
    if not any(words in str(error) for words in _REFUSALS):
        return error
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    implementation = f" (attention implementation {attention!r})" if attention else ""
    return RuntimeError(
        f"method='exact': the model{implementation} cannot be differentiated twice: {str(error).splitlines()[0]} "
        "Use method='central' or 'forward', or attention that is written out (attn_implementation='eager'), without "
        "torch.compile and with use_reentrant=False in gradient checkpointing."
    )
