"""The radius that finds itself: long enough for the difference to rise above rounding, short enough for curvature to last.

Of the difference rel = ‖Δ‖/‖d‖, rounding of size n makes the share n/rel, and curvature that changes within the step one
that grows as rel, or as rel² in a central difference. These balance near

    rel = 0.7·n^(1/(order + 1))        order: 1 for "forward", 2 for "central"

On SmolLM2-135M this held in bf16, bf16 autocast and fp16, at radii that differ by a factor of eight. rel is known in every
step, and n, the noise floor of Δ, since the last check.
"""

from __future__ import annotations

from torch import Tensor

from gradreg_optim.core.step import Scalar

AUTO = "auto"
START = 0.005
"""The radius of a first step, which is checked."""
BALANCE = 0.7
LEAST, MOST = 1e-6, 1.0
"""Bounds of the radius."""
FASTEST = 2.0
"""The largest factor by which it changes from one step to the next."""


def balanced(noise: float, order: int) -> float:
    """The rel to aim at, at least half as much again as the noise; noise of 0 is below what float32 can tell.

    >>> round(balanced(0.05, order=1), 3), round(balanced(0.025, order=2), 3)
    (0.157, 0.205)
    """
    return float(max(BALANCE * max(noise, 1e-7) ** (1 / (order + 1)), 1.5 * noise))


def longer(radius: Scalar) -> float:
    """The radius after a step that the arithmetic swallowed. Waits for the device."""
    return min(float(radius) * FASTEST**2, MOST)


def following(radius: Scalar, relative_square: Tensor, noise: float, order: int) -> Tensor:
    """The radius of the next step, half of the way, in logarithms, to where the square of rel would be balanced.

    The part of rel that is curvature is in proportion to the radius. Every batch has another balance: half of the way
    averages over some. The radius stays where it is if nothing is known.

    >>> import torch
    >>> following(0.005, torch.tensor(0.157**2), noise=0.05, order=1)
    tensor(0.0050)
    >>> following(0.005, torch.tensor(0.001**2), noise=0.05, order=1)
    tensor(0.0100)
    """
    wanted, found = balanced(noise, order) ** 2 - noise**2, relative_square - noise**2
    factor = (found / wanted).nan_to_num(1.0).clamp(FASTEST**-4, FASTEST**4).pow(-0.25)
    return (radius * factor).clamp(LEAST, MOST)
