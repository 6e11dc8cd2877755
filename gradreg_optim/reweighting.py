"""The completions of a policy at θ, reweighted as if the policy at θ' had drawn them.

The gradient of an expected reward at θ' is an expectation over π_θ'. On completions y that π_θ drew, it takes
the ratio of whole completions as their weight, by importance sampling:

    ∇J(θ') = E_{y ∼ π_θ'}[A(y)·∇log π_θ'(y)] = E_{y ∼ π_θ}[w(y)·A(y)·∇log π_θ'(y)],   w(y) = π_θ'(y)/π_θ(y)

A loss with a ratio r to an older policy that drew y, as PPO's, keeps the r that it had at θ. So it clips at
θ' what it clipped at θ, and nothing else: a clip range that is passed ahead of θ and not behind it would look
like curvature.
"""

from __future__ import annotations

import torch
from torch import Tensor


def completion_weights(log_p: Tensor, mask: Tensor, first: Tensor) -> Tensor:
    """The weights w, (completions, 1), without gradient, in float32 at least; exactly 1 where nothing moved.

    The arguments are those of :func:`reweighted`.
    """
    log_w = (log_p.detach() - first.detach()) * mask
    return log_w.sum(1, keepdim=True, dtype=torch.promote_types(log_p.dtype, torch.float32)).exp()


def reweighted(
    log_p: Tensor, mask: Tensor, first: Tensor, old: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The ratio and the weights of completions, for the loss of a policy in a loop over ``passes()``.

    ::

        for point in optimizer.passes():
            optimizer.zero_grad()
            log_p = log_probabilities(model, completions)
            if point is Point.THETA:
                first = log_p.detach()
            ratio, weight = reweighted(log_p, mask, first)
            loss = -(weight * ratio * advantages[:, None] * mask).sum() / mask.sum()
            loss.backward()

    Multiply the whole loss of a completion by its weight. Whatever form it has in ``ratio``, clipped or not,
    its gradient at θ' is then unbiased, as if the completions had been drawn there. A KL penalty takes
    ``log_p`` itself, and the weight too.

    Args:
        log_p: log-probabilities of the completions' tokens at the current weights, (completions, tokens),
            float32 or float64, with gradient.
        mask: 1 or true for the tokens that the policy wrote, 0 for padding and what tools wrote; same shape.
        first: ``log_p`` of the pass at θ, on the same completions; same shape.
        old: log-probabilities under the policy that drew the completions, same shape, if that is not the one
            at θ: in PPO's further iterations.

    Returns:
        The ratio, (completions, tokens): its value is that of the pass at θ, exp(first − old) or 1, and its
        gradient that of ``log_p``. And the weights w, (completions, 1), without gradient: 1 at θ.

    Raises:
        ValueError: the shapes differ, or ``first`` is missing.

    >>> log_p, first = torch.tensor([[-1.0, -2.0]], requires_grad=True), torch.tensor([[-1.5, -2.0]])
    >>> ratio, weight = reweighted(log_p, torch.tensor([[1, 1]]), first)
    >>> ratio.tolist(), weight                 # 1, and e to the power of 0.5
    ([[1.0, 1.0]], tensor([[1.6487]]))
    """
    given = {"log_p": log_p, "mask": mask, "first": first, **({} if old is None else {"old": old})}
    shapes = {name: getattr(value, "shape", None) for name, value in given.items()}
    if log_p.dim() != 2 or set(shapes.values()) != {log_p.shape}:
        found = ", ".join(f"{name}={shape and tuple(shape)}" for name, shape in shapes.items())
        raise ValueError(
            f"shapes {found}: each has to be (completions, tokens), of the same completions. Keep "
            "first = log_p.detach() of the pass at Point.THETA, anew for each micro-batch."
        )
    held = first.detach() - (first if old is None else old).detach()
    return (log_p - log_p.detach() + held).exp(), completion_weights(log_p, mask, first)
