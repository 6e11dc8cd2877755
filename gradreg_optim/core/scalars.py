"""Arithmetic on scalars that nobody has read yet: 0-d tensors on the device of the data, so that nothing here waits for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Scalar = float | Tensor
"""A Python number, or a 0-d tensor that nobody has read yet."""


def stack_scalars(values: Sequence[Scalar], like: Tensor | None = None) -> Tensor:
    """Python numbers and 0-d tensors as one vector, on the device and in the widest dtype of its tensors or of ``like``."""
    tensors = [value for value in values if isinstance(value, Tensor)] if like is None else [like]
    dtype = max((tensor.dtype for tensor in tensors), key=lambda dtype: dtype.itemsize, default=torch.float32)
    device = tensors[0].device if tensors else torch.device("cpu")
    scalars = [
        # Copying a number to the device instead of filling in would wait for it.
        value.to(device, dtype) if isinstance(value, Tensor) else torch.full((), value, dtype=dtype, device=device)
        for value in values
    ]
    return torch.stack(scalars) if len(scalars) > 1 else scalars[0].reshape(1)


def ratio(numerator: Scalar, denominator: Tensor) -> Tensor:
    """``numerator / denominator``, and 0 where the denominator is 0 (a vanishing gradient has no direction)."""
    return numerator / denominator.masked_fill(denominator == 0, torch.inf)


def is_finite(norm: Tensor) -> Tensor:
    """Whether a norm, or a square, is neither infinite nor NaN."""
    return norm < torch.inf


def clip_coefficient(norm: Tensor, max_norm: float | None) -> Tensor:
    """The factor min(1, max_norm / (norm + 1e-6)) of :func:`torch.nn.utils.clip_grad_norm_`; 1 without a bound."""
    if max_norm is None:
        return torch.ones_like(norm)
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def clipped_moments(inner: Tensor, squares: Tensor, g1_squared: Tensor, *, coefficient: Tensor) -> tuple[Tensor, Tensor]:
    """⟨c·g2 − g1, g1⟩ and ‖c·g2 − g1‖² of a clipped g2, from those of g2 − g1 and without another pass over memory.

    With δ = g2 − g1: c·g2 − g1 = c·δ − (1 − c)·g1. The square may cancel to less than 0 by rounding, and is clamped.
    """
    c, rest = coefficient, 1 - coefficient
    lost = rest * g1_squared
    squares = torch.addcmul(c * torch.sub(c * squares, rest * inner, alpha=2), rest, lost).clamp(min=0)
    return c * inner - lost, squares


def length_of_sum(squares_of_first: Tensor, inner: Tensor, squares: Tensor) -> Tensor:
    """‖a + b‖ out of parts of ‖a‖², ⟨a, b⟩ and ‖b‖².

    A sum that cancels may come out below 0, and its root as NaN: it is clamped, which lets a NaN of the parts through.

    >>> length_of_sum(torch.tensor([9.0]), torch.tensor([0.0]), torch.tensor([16.0]))
    tensor(5.)
    """
    return torch.add(squares_of_first + squares, inner, alpha=2).sum().clamp(min=0).sqrt()


def item_on_cpu(value: Scalar) -> Scalar:
    """A Python number where reading costs nothing (CPU), and the 0-d tensor itself where it would stall a device."""
    return value.item() if isinstance(value, Tensor) and value.device.type == "cpu" else value
