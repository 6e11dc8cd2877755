"""Which policy the second pass of GRPO, RLOO and similar losses calls "old": the setting ``resample``.

These losses estimate ∇J(θ) = E[A(y) ∇log π_θ(y)], y ∼ π_θ, through a ratio to the old policy, which drew y. The second
pass runs at θ' on the same completions. Both modes cost the same, apart from one stored number per token.

``"reuse"``, the published default: if the inputs hold no old log-probabilities, GRPO takes the policy at θ' as old. Its
    ratio is 1, so (g2 − g1)/ε lacks one term of H·d: E[A ∇log π (∇log π · d)], the change of the distribution of y.
``"sequence"``, where that bias matters: old is the policy at θ, and every loss takes the ratio π_θ'(y)/π_θ(y) of whole
    completions, times its own ratio in the first pass. The gradient is unbiased, as if completions had been drawn at θ'.
    The clip range is open in the further passes, unless the first pass clipped: a ratio that is clipped ahead of θ and
    not behind it would look like curvature.

Old log-probabilities in the inputs (RLOO's; GRPO's with several iterations or steps per generation, or vLLM's
correction) stay: they belong to the policy that drew y. Advantages are constants (RLOO's contain its KL penalty), tokens
are selected by entropy or dropped as off-policy again, and only ``use_bias_correction_kl`` reweights GRPO's KL penalty.
With ``"reuse"`` clip ranges act at θ' (``clipped_by_loss``). VESPO is refused: its weight is not the ratio, and falls
with it where advantages are positive.

Relied upon (trl 0.27 to 1.16): the names below; losses call ``LOG_P_METHOD`` before they read ``old_per_token_logps``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gradreg_optim.trainers.patches import Patches

LOG_P_METHOD = "_get_per_token_logps_and_entropies"
"""The trainer's method whose first result is the log-probabilities of completions, (completions, tokens)."""

_OLD = "old_per_token_logps"
_OF_COMPLETIONS = "old_logps"
_OLD_LOG_P = (_OLD, _OF_COMPLETIONS, "old_log_probs")
"""Keys of the old log-probabilities in the inputs of GRPO, RLOO and AsyncGRPO."""

_CLIP_RANGE = ("epsilon_low", "epsilon_high")
"""Attributes of GRPO's and RLOO's trainers."""

_CLIPPED = ("clip_ratio/region_mean", "cispo_clip_ratio", "clip_ratio")
"""Metrics of the clipped fraction: of GRPO and RLOO, of CISPO, of GRPO with Liger's loss."""


@dataclass
class FirstPass:
    """What the further passes of a loss need of its first one: log-probabilities of completions, whether it clipped."""

    log_p: Tensor | None = None
    has_clipped: bool = False


class OldPolicy:
    """Records the log-probabilities of a trainer's first pass, and gives the second pass its old policy."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._listener: Callable[[Tensor], None] | None = None

    @contextmanager
    def keeping(self, resample: str, inputs: Mapping[str, Any], first: FirstPass) -> Iterator[None]:
        """Around the first pass of a loss on ``inputs``: keep what further passes need, or refuse."""
        if resample == "reuse":
            yield
            return
        if getattr(self._trainer, "loss_type", None) == "vespo":
            raise self.refusal(
                resample, "loss_type='vespo' weighs completions by a function that is not their ratio"
            )
        before = clipped_so_far(self._trainer)

        def keep(
            log_p: Tensor,
        ) -> None:  # in the loss's own dtype, so that at θ itself the ratio is 1 bit for bit
            first.log_p = log_p.detach().clone()

        if has_old_policy(inputs, (_OF_COMPLETIONS,)):
            yield
        else:
            with Patches().set(self, "_listener", keep):
                yield
            if first.log_p is None:
                raise self.refusal(resample, "its loss computed no log-probabilities of completions")
        first.has_clipped = bool(clipped_by_loss(self._trainer, before))

    @contextmanager
    def repeating(self, resample: str, inputs: Any, first: FirstPass) -> Iterator[None]:
        """Around a further pass of a loss on ``inputs``: its ratio refers to the policy of the first pass."""
        log_p_then: Any = first.log_p

        def replace_old(log_p: Tensor) -> None:
            given, tool_mask = inputs.get(_OLD), inputs.get("tool_mask")
            mask = inputs["completion_mask"] if tool_mask is None else inputs["completion_mask"] * tool_mask
            log_w = ((log_p.detach() - log_p_then) * mask).sum(1, keepdim=True)
            # The loss computes log p − old for each token. Make that log w plus its value in the first pass.
            inputs[_OLD] = log_p.detach() - log_w - (0 if given is None else log_p_then - given)

        with Patches() as patches:
            if log_p_then is not None:
                patches.set(self, "_listener", replace_old)
            for name in _CLIP_RANGE if resample == "sequence" and not first.has_clipped else ():
                if hasattr(self._trainer, name):
                    patches.set(self._trainer, name, math.inf)
            yield

    def refusal(self, resample: str, why: str) -> RuntimeError:
        """Return the error about completions that cannot be reweighted."""
        return RuntimeError(
            f"{type(self._trainer).__name__}: resample={resample!r} takes ratios to the policy at θ, but {why}. "
            "Use resample='reuse', or GRPO or RLOO with one of TRL's own losses, not Liger's."
        )

    def __call__(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``method``, which is ``LOG_P_METHOD``; its first call in a loss is the one on unmodified completions."""
        result = method(*args, **kwargs)
        listener, self._listener = self._listener, None
        if listener is not None:
            listener(result[0])
        return result


def has_old_policy(inputs: Any, names: tuple[str, ...] = _OLD_LOG_P) -> bool:
    """Return whether the inputs of a loss hold log-probabilities of the policy that drew the completions."""
    return isinstance(inputs, Mapping) and any(inputs.get(name) is not None for name in names)


def clipped_by_loss(trainer: Any, before: Mapping[str, int]) -> float | None:
    """Return the fraction of tokens, or of completions where those have one ratio, that the last loss clipped.

    The figure is the loss's own, over all ranks. ``before``: :func:`clipped_so_far` at the start of that loss; ``None`` if
    the loss has logged no such metric since.
    """
    figures = _figures(trainer)
    return next(
        (float(figures[name][-1]) for name, now in clipped_so_far(trainer).items() if now > before[name]),
        None,
    )


def clipped_so_far(trainer: Any) -> dict[str, int]:
    """Return how many clipped fractions the trainer has logged since its last log, for each of their names."""
    figures = _figures(trainer)
    return {name: len(figures.get(name, ())) for name in _CLIPPED}


def _figures(trainer: Any) -> Mapping[str, list[float]]:
    metrics = getattr(trainer, "_metrics", None)
    figures = metrics.get("train") if isinstance(metrics, Mapping) else None
    return figures if isinstance(figures, Mapping) else {}
