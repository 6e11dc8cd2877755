r"""What the second pass of a policy gradient measures: completions that were drawn before θ' was known.

GRPO, RLOO and their kin estimate :math:`∇J(θ) = E_{y∼π_θ}[A(y) ∇\log π_θ(y)]` on completions of a policy that they call
"old", through the ratio of the two policies. At θ' the completions are the same, and the setting says what is old:

``"reuse"``, as published: whatever the trainer takes. GRPO whose inputs hold no old log-probabilities (one iteration, as
    many steps per generation as are accumulated) takes the policy that it differentiates. At θ' the ratio is 1 again, and
    :math:`E[g_2] = E_{y∼π_θ}[A ∇\log π_{θ'}]`: of :math:`H_J d`, :math:`(g_2 − g_1)/ε` lacks the term
    :math:`E[A ∇\log π \, (∇\log π · d)]` in which the policy draws other completions.
``"importance"``: the policy of the first pass. Its log-probabilities are kept, one number per token of a completion, and
    given to the second pass as ``old_per_token_logps``. The loss's own ratio then reweights the completions.
``"sequence"``: the same, and whatever ratio the loss would take, its value at θ' is that of the whole completion,
    :math:`w = π_{θ'}(y)/π_θ(y)` (times what the first pass had). So
    :math:`E_{y∼π_θ}[w A ∇\log π_{θ'}] = E_{y∼π_{θ'}}[A ∇\log π_{θ'}] = ∇J(θ')`, as if new completions had been drawn.

With ``"importance"`` the loss's ratio decides how much of the missing term is there:

- RLOO, whose ratio is that of whole completions, and completions of one token: all of it, E[g2] = ∇J(θ') at any ε;
- ratios of single tokens (GRPO, CISPO, to first order SAPO): a token counts as drawn at θ', those before and after it as
  drawn at θ. Of the term's T² pairs of tokens, only the T of a token with itself are there, which can be as far from H·d as
  none of them. It is H of the loss with "old" held constant, and what differentiating that loss twice would give;
- geometric means (``importance_sampling_level="sequence"``, GMPO): all pairs, at one T-th of their weight for T tokens;
- VESPO's weight φ(w) falls with w where advantages are positive: refused, with ``"sequence"`` too.

Inputs that hold old log-probabilities (RLOO always; GRPO with several iterations or steps per generation, or vLLM's
correction) keep them: they belong to the policy :math:`π_s` that drew the completions, and
:math:`E_{y∼π_s}[(π_{θ'}/π_s) A ∇\log π_{θ'}]` is :math:`∇J(θ')` already. ``"reuse"`` and ``"importance"`` are the same
there; ratios to :math:`π_θ` would be wrong by :math:`π_θ/π_s`.

The same in all three: clip ranges act on the ratio at θ' (``clipped_by_loss``), advantages are constants (RLOO's contain its
KL penalty), tokens chosen by entropy or dropped as off-policy are chosen again at θ', and GRPO's KL penalty is reweighted
with ``use_bias_correction_kl`` only.

Relied upon (trl 0.27 to 1.16): the names below, and that losses call ``METHOD`` before they read ``old_per_token_logps``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

METHOD = "_get_per_token_logps_and_entropies"
"""The trainer's method that returns the log-probabilities of a loss, (completions, tokens), before anything else."""

_OLD = "old_per_token_logps"
_OF_COMPLETIONS = "old_logps"
_GIVEN = (_OLD, _OF_COMPLETIONS, "old_log_probs")
"""What inputs call the log-probabilities of the policy that drew the completions: GRPO, RLOO, AsyncGRPO."""

_CLIPPED = ("clip_ratio/region_mean", "cispo_clip_ratio", "clip_ratio")
"""What losses call the clipped fraction among their metrics: GRPO and RLOO, CISPO, GRPO with Liger's loss."""


class OldPolicy:
    """Listens to a trainer's log-probabilities, and tells the second pass which policy is the old one."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._heard: Callable[[Tensor], None] | None = None

    @contextmanager
    def keeping(self, resample: str, inputs: Mapping[str, Any], kept: list[Tensor]) -> Iterator[None]:
        """Inside the block, the first pass of a loss on ``inputs``, append to ``kept`` what the second one needs.

        Raises:
            RuntimeError: the loss has no ratio to an old policy, or not one that can be had.
        """
        if getattr(self._trainer, "loss_type", None) == "vespo":
            raise self.refusal(resample, "loss_type='vespo' weighs completions by a function that is not their ratio")
        if _holds(inputs, _OF_COMPLETIONS) or (resample == "importance" and is_given(inputs)):
            yield
            return
        # In the loss's own dtype, so that at θ itself the ratio is 1 bit for bit.
        with self._hearing(lambda log_p: kept.append(log_p.detach().clone())):
            yield
        if not kept:
            raise self.refusal(resample, "its loss asked for no log-probabilities of completions")

    @contextmanager
    def repeating(self, resample: str, inputs: Any, kept: list[Tensor]) -> Iterator[None]:
        """Let a loss inside the block, on ``inputs`` at other weights, take its ratio to the policy that was ``kept``."""
        if not kept or resample == "importance":
            if kept:
                inputs[_OLD] = kept[0]
            yield
            return
        given, tool_mask = inputs.get(_OLD), inputs.get("tool_mask")
        mask = inputs["completion_mask"] if tool_mask is None else inputs["completion_mask"] * tool_mask

        def whole(log_p: Tensor) -> None:
            log_w = ((log_p.detach() - kept[0]) * mask).sum(1, keepdim=True)
            # The loss takes log p − old, per token: let its value be log w, plus what it was in the first pass.
            inputs[_OLD] = log_p.detach() - log_w - (0 if given is None else kept[0] - given)

        with self._hearing(whole):
            yield

    def refusal(self, resample: str, why: str) -> RuntimeError:
        """The error that says why completions cannot be reweighted."""
        return RuntimeError(
            f"{type(self._trainer).__name__}: resample={resample!r} takes ratios to the first pass's policy, but {why}. "
            "Use resample='reuse', or GRPO or RLOO with one of TRL's own losses, not Liger's."
        )

    def __call__(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What ``method`` returns; of several calls in one loss the first is that of the completions as they are."""
        result = method(*args, **kwargs)
        heard, self._heard = self._heard, None
        if heard is not None:
            heard(result[0])
        return result

    @contextmanager
    def _hearing(self, heard: Callable[[Tensor], None]) -> Iterator[None]:
        """Tell ``heard`` the first log-probabilities that are computed inside the block."""
        self._heard = heard
        try:
            yield
        finally:
            self._heard = None


def is_given(inputs: Any) -> bool:
    """Whether the inputs of a loss hold log-probabilities of the policy that drew the completions."""
    return any(_holds(inputs, name) for name in _GIVEN)


def _holds(inputs: Any, name: str) -> bool:
    return isinstance(inputs, Mapping) and inputs.get(name) is not None


def clipped_by_loss(trainer: Any, before: Mapping[str, Any]) -> float | None:
    """The fraction of tokens, or of completions where those have one ratio, that the loss has just clipped.

    It is the loss's own figure, over all ranks: a ratio outside the range, on the side on which the clip takes hold.
    ``before`` are the trainer's counters at the start of that loss; ``None`` if it counted nothing since.
    """
    now, then = (_figures(attributes) for attributes in (vars(trainer), before))
    for name in _CLIPPED:
        values = now.get(name, [])
        if len(values) > len(then.get(name, [])):
            return float(values[-1])
    return None


def _figures(attributes: Mapping[str, Any]) -> Mapping[str, list[float]]:
    metrics = attributes.get("_metrics")
    figures = metrics.get("train") if isinstance(metrics, Mapping) else None
    return figures if isinstance(figures, Mapping) else {}
