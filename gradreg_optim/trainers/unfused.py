"""Replaces TRL's fused log-probabilities by operations that can be differentiated twice, for ``method="exact"``.

Cost: the whole ``[tokens, vocabulary]`` matrix of logits is in memory, which the fused kernels avoid.

Relied upon (trl 1.16; earlier versions have no such kernel): ``trl.trainer.utils._ChunkedLogProbFunction``, its arguments
and outputs, and ``trl.trainer.utils.is_triton_available``, which selects the fused kernel on logits.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gradreg_optim.trainers.hooks import Hooks


class LogProbabilities:
    """Replaces ``ChunkedLogProbFunction``, an autograd function whose backward has no derivative."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        _chunk_size: int,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = (),
    ) -> tuple[Tensor | None, ...]:
        """Return log p of ``targets`` [N] for ``hidden`` [N, H] @ ``weight``ᵀ [H, V], and the optional ``outputs`` [N]."""
        logits = F.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
        logits = logits.float() * logit_scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits / temperature
        log_p = logits.log_softmax(-1)
        optional: dict[str, Callable[[], Tensor]] = {
            "entropy": lambda: -(log_p.exp() * log_p).sum(-1),
            "log_sum_sq_probs": lambda: (2 * log_p).logsumexp(-1).detach(),
            "mean_logits": lambda: logits.mean(-1).detach(),
            "is_top1": lambda: logits.argmax(-1) == targets,
        }
        found = (compute() if name in outputs else None for name, compute in optional.items())
        return log_p.gather(-1, targets[:, None]).squeeze(-1), *found


@contextmanager
def unfused() -> Iterator[None]:
    """Let TRL's losses compute log-probabilities without fused kernels inside the block."""
    utils: Any = sys.modules.get("trl.trainer.utils")
    with Hooks() as replaced:
        if hasattr(utils, "_ChunkedLogProbFunction"):
            replaced.set(utils, "_ChunkedLogProbFunction", LogProbabilities)
            replaced.answer(utils, "is_triton_available", lambda _original: False)
        yield
