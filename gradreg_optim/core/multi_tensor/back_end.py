"""Finds out whether Triton's kernels can be used."""

import functools
import warnings
from typing import Any

import torch


@functools.cache
def kernels() -> Any:
    """The Triton back end, if Triton is there and works, else ``None``."""
    try:
        from gradreg_optim.core.multi_tensor import triton_kernels

        if torch.cuda.is_available():
            triton_kernels.norm_squared([torch.zeros(1, device="cuda")])
        return triton_kernels
    except ImportError:
        return None
    except Exception as error:  # whatever a compiler may raise
        warnings.warn(
            "Gradient regularization: Triton does not work here, so that each step takes more kernel "
            f"launches: {type(error).__name__}: {error}",
            stacklevel=2,
        )
        return None
