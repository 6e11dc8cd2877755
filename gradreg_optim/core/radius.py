"""The radius that finds itself: long enough for the difference to rise above rounding, short enough for curvature to last.

Of the difference rel = ‖Δ‖/‖d‖, rounding makes the share floor/rel, which falls as the step grows, and curvature that
changes within the step makes one that grows with it. On SmolLM2-135M they were found to balance near rel = 0.65·√floor, in
bf16 and in fp16, over radii that differ by a factor of eight. rel is known in every step, the floor since the last check.
"""

from __future__ import annotations

import math

from torch import Tensor

from gradreg_optim.core.step import Scalar

AUTO = "auto"
START = 0.005
"""The radius of a first step, which is checked."""
BALANCE = 0.65
LEAST, MOST = 1e-6, 1.0
"""Bounds of the radius."""
FASTEST = 2.0
"""The largest factor by which it changes from one step to the next."""


def balanced(floor: float) -> float:
    """The rel to aim at; a floor of 0 is below what float32 can tell.

    >>> round(balanced(0.05), 3)
    0.145
    """
    return BALANCE * math.sqrt(max(floor, 1e-7))


def longer(radius: Scalar) -> float:
    """The radius after a step that the arithmetic swallowed. Waits for the device."""
    return min(float(radius) * FASTEST**2, MOST)


def following(radius: Scalar, relative_square: Tensor, floor: float) -> Tensor:
    """The radius of the next step, half of the way, in logarithms, to where the square of rel would be balanced.

    Every batch has another balance: half of the way averages over some. It stays where it is if nothing is known.

    >>> following(0.005, torch.tensor(0.145**2), floor=0.05)
    tensor(0.0050)
    >>> following(0.005, torch.tensor(0.001**2), floor=0.05)
    tensor(0.0100)
    """
    factor = (balanced(floor) ** 2 / relative_square).pow(0.25).nan_to_num(1.0, FASTEST).clamp(1 / FASTEST, FASTEST)
    return (radius * factor).clamp(LEAST, MOST)
