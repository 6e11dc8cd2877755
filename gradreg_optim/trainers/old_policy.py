"""Which policy the second pass of GRPO, RLOO and similar losses calls "old": the setting ``resample``.

These losses estimate ∇J(θ) = E[A(y) ∇log π_θ(y)], y ∼ π_θ, through a ratio to the old policy, which drew y.
The second pass runs at θ' on the same completions. Both modes cost the same, apart from one stored number per
token.

``"reuse"``, as published: if the inputs hold no old log-probabilities, GRPO takes the policy at θ'
    as old. Its ratio is 1, so (g2 − g1)/ε lacks one term of H·d: E[A ∇log π (∇log π · d)], the change of the
    distribution of y. Old log-probabilities in the inputs (RLOO's; GRPO's with several iterations or steps
    per generation, or vLLM's correction) stay: they belong to the policy that drew y. Clip ranges act at θ'.
``"sequence"``, where that bias matters: every loss keeps the ratio of its first pass, and with it what it
    clips, and its advantages are multiplied by w = π_θ'(y)/π_θ(y) of whole completions. The gradient is
    unbiased, as if completions had been drawn at θ' (:mod:`gradreg_optim.reweighting`).

Advantages are constants otherwise (RLOO's contain its KL penalty). GRPO's KL penalty is not reweighted.
Tokens are selected by entropy again.

Relied upon (trl 0.27 to 1.16): the names below; losses call ``LOG_P_METHOD`` before they read ``advantages``
and old log-probabilities, which they use for the ratio alone; they are linear in the size of the advantages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gradreg_optim.reweighting import completion_weights
from gradreg_optim.trainers.patches import Patches
from gradreg_optim.wrapping.settings import say

LOG_P_METHOD = "_get_per_token_logps_and_entropies"
"""The trainer's method whose first result is the log-probabilities of completions, (completions, tokens)."""

_OLD = "old_per_token_logps"
_OF_COMPLETIONS = "old_logps"
_OLD_LOG_P = (_OLD, _OF_COMPLETIONS, "old_log_probs")
"""Keys of the old log-probabilities in the inputs of GRPO, RLOO and AsyncGRPO."""

_CLIPPED = ("clip_ratio/region_mean", "cispo_clip_ratio", "clip_ratio")
"""Metrics of the clipped fraction: of GRPO and RLOO, of CISPO, of GRPO with Liger's loss."""


@dataclass
class FirstPass:
    """Of the first pass of a loss: the log-probabilities of completions, if further passes need them."""

    log_p: Tensor | None = None


class OldPolicy:
    """Records the log-probabilities of a trainer's first pass, and gives the second pass its old policy."""

    def __init__(self, trainer: Any) -> None:
        self._trainer, self._is_told = trainer, False
        self._draws = hasattr(trainer, LOG_P_METHOD) or hasattr(trainer, "judge")
        self._listener: Callable[[Tensor], None] | None = None

    @contextmanager
    def keeping(self, resample: str | None, inputs: Mapping[str, Any], first: FirstPass) -> Iterator[None]:
        """Around the first pass of a loss on ``inputs``: keep what further passes need, or refuse."""
        if resample == "reuse":
            yield
            return

        def keep(log_p: Tensor) -> None:
            first.log_p = log_p.detach().clone()  # in the loss's own dtype: at θ itself the weight is 1

        with Patches().set(self, "_listener", keep):
            yield
        if first.log_p is None or "advantages" not in inputs:
            first.log_p = None
            self.refuse(resample, "its loss computed no log-probabilities of completions")

    @contextmanager
    def repeating(self, inputs: Any, first: FirstPass) -> Iterator[None]:
        """Around a further pass of a loss on ``inputs``, a copy: reweight them if the first pass was kept."""
        then: Any = first.log_p

        def reweight(log_p: Tensor) -> None:
            tool_mask, advantages = inputs.get("tool_mask"), inputs["advantages"]
            mask = inputs["completion_mask"] if tool_mask is None else inputs["completion_mask"] * tool_mask
            change, weights = log_p.detach() - then, completion_weights(log_p, mask, then)
            # The loss subtracts old log-probabilities. They follow the change, so its ratio is that at θ.
            if has_old_policy(inputs, (_OF_COMPLETIONS,)):
                ratio = ((then * mask).sum(1) - inputs[_OF_COMPLETIONS]).exp()
                low, high = 1 - self._trainer.epsilon_low, 1 + self._trainer.epsilon_high
                is_clipped = (ratio > high) & (advantages > 0) | (ratio < low) & (advantages < 0)
                # These have no gradient. Their loss stays, too, so that ``loss_check`` holds.
                weights = weights.masked_fill(is_clipped[:, None], 1)
                inputs[_OF_COMPLETIONS] = inputs[_OF_COMPLETIONS] + (change * mask).sum(1)
            else:
                inputs[_OLD] = log_p.detach() if inputs.get(_OLD) is None else inputs[_OLD] + change
            inputs["advantages"] = advantages * (weights if advantages.dim() > 1 else weights[:, 0])

        with nullcontext() if then is None else Patches().set(self, "_listener", reweight):
            yield

    def refuse(self, resample: str | None, why: str) -> None:
        """Raise because completions cannot be reweighted; if nobody has asked for it, say so once."""
        name = type(self._trainer).__name__
        if resample == "sequence":
            raise RuntimeError(
                f"{name}: resample='sequence' takes ratios to the policy at θ, but {why}. Use "
                "resample='reuse', or GRPO or RLOO with one of TRL's own losses, not Liger's."
            )
        if resample is None and self._draws and not self._is_told:
            self._is_told = True
            say(
                f"Gradient regularization: resample='reuse' in {name}, because {why}. Its second pass takes "
                "completions as they are, and the penalty lacks the change of their distribution."
            )

    def __call__(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call the ``LOG_P_METHOD``. Its first call in a loss is the one on unmodified completions."""
        result = method(*args, **kwargs)
        listener, self._listener = self._listener, None
        if listener is not None:
            listener(result[0])
        return result


def has_old_policy(inputs: Any, names: tuple[str, ...] = _OLD_LOG_P) -> bool:
    """Return whether the inputs of a loss hold log-probabilities of the policy that drew the completions."""
    return isinstance(inputs, Mapping) and any(inputs.get(name) is not None for name in names)


def clipped_by_loss(trainer: Any, before: Mapping[str, int]) -> float | None:
    """Return the fraction of tokens, or of completions where they have one ratio, that the last loss clipped.

    The figure is the loss's own, over all ranks. ``before``: :func:`clipped_so_far` at the start of that
    loss; ``None`` if the loss has logged no such metric since.
    """
    figures = _figures(trainer)
    return next(
        (float(figures[name][-1]) for name, now in clipped_so_far(trainer).items() if now > before[name]),
        None,
    )


def clipped_so_far(trainer: Any) -> dict[str, int]:
    """Return how many clipped fractions of each name the trainer has logged since its last log."""
    figures = _figures(trainer)
    return {name: len(figures.get(name, ())) for name in _CLIPPED}


def _figures(trainer: Any) -> Mapping[str, list[float]]:
    metrics = getattr(trainer, "_metrics", None)
    figures = metrics.get("train") if isinstance(metrics, Mapping) else None
    return figures if isinstance(figures, Mapping) else {}
