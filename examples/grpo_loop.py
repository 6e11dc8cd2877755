"""GRPO by hand, with gradient regularization on reweighted completions.

    python examples/grpo_loop.py

A small recurrent policy learns to repeat its prompt. A program verifies the answers. Each step draws groups
of answers, splits them into micro-batches of whole groups, and takes the passes of each micro-batch: at θ,
where the answers were drawn, and at θ', where ``reweighted`` makes up for that.

This verifier is right, so there is no hacking to prevent, and the penalty slows the policy down: compare
``--strength 0``.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from gradreg_optim import GradRegOptimizer, Point, reweighted

END, SYMBOLS = 0, 6
"""The token that ends an answer, and the number of tokens."""
PROMPT, ANSWER = 2, 4
"""The lengths of a prompt and of the longest answer."""
GROUPS, GROUP, MICRO_BATCHES = 8, 16, 2
"""Prompts in a step, answers to each of them, and micro-batches, which hold whole groups."""


class Policy(nn.Module):
    """A causal language model: logits (rows, tokens, SYMBOLS) of the token after each one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, 32)
        self.recurrent = nn.GRU(32, 64, batch_first=True)
        self.head = nn.Linear(64, SYMBOLS)

    def forward(self, ids: Tensor) -> Tensor:
        """``ids``: (rows, tokens), int64."""
        return self.head(self.recurrent(self.embedding(ids))[0])


def log_probabilities(model: nn.Module, prompts: Tensor, answers: Tensor) -> Tensor:
    """The log-probability of each token of the answers, (completions, ANSWER)."""
    logits = model(torch.cat([prompts, answers], 1))[:, PROMPT - 1 : -1]
    return logits.log_softmax(-1).gather(-1, answers[..., None]).squeeze(-1)


@torch.no_grad()
def draw(model: nn.Module, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """One answer to each prompt, and its mask, both (completions, ANSWER): 1 up to the token that ends it."""
    ids = prompts
    for _ in range(ANSWER):
        ids = torch.cat([ids, torch.multinomial(model(ids)[:, -1].softmax(-1), 1)], 1)
    answers = ids[:, PROMPT:]
    ended = (answers == END).long()
    return answers, (ended.cumsum(1) - ended == 0).long()


def verify(prompts: Tensor, answers: Tensor) -> Tensor:
    """The reward of each answer: the share of tokens that repeat the prompt, and then end."""
    expected = torch.cat([prompts, torch.full((len(prompts), 1), END)], 1)
    return (answers[:, : PROMPT + 1] == expected).float().mean(1)


def train(strength: float | str, steps: int) -> list[float]:
    """Train a policy; returns the mean reward of each step."""
    torch.manual_seed(0)
    model, means = Policy(), []
    base = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer = GradRegOptimizer(base, strength=strength)
    for step in range(steps):
        prompts = torch.randint(1, SYMBOLS, (GROUPS, PROMPT)).repeat_interleave(GROUP, 0)
        answers, mask = draw(model, prompts)
        rewards = verify(prompts, answers)
        groups = rewards.view(GROUPS, GROUP)
        advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
        batch = (prompts, answers, mask, advantages.view(-1, 1))
        for part in zip(*(tensor.chunk(MICRO_BATCHES) for tensor in batch), strict=True):
            prompt, answer, counts, advantage = part
            for point in optimizer.passes(micro_batches=MICRO_BATCHES):
                optimizer.zero_grad()
                log_p = log_probabilities(model, prompt, answer)
                if point is Point.THETA:
                    first = log_p.detach()
                ratio, weight = reweighted(log_p, counts, first)
                # The sum over micro-batches is the step's mean over tokens.
                loss = -(weight * ratio * advantage * counts).sum() / mask.sum()
                loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        means.append(rewards.mean().item())
        if step % 10 == 0 or step == steps - 1:
            figures = optimizer.metrics
            penalty = f"penalty ratio {float(figures.get('penalty_ratio', 0)):.3f}"
            print(f"step {step}: reward {means[-1]:.3f}, {penalty}, skipped {int(figures['skipped'])}")
    return means


def auto_or_number(text: str) -> float | str:
    """γ, as ``--strength`` takes it."""
    strength = text if text == "auto" else float(text)
    if not isinstance(strength, str) and not strength >= 0:
        raise argparse.ArgumentTypeError(f"{text} must be auto, or at least 0")
    return strength


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--strength", type=auto_or_number, default="auto", help="γ, the weight of the penalty; auto finds it"
    )
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    if args.steps < 1:
        parser.error("--steps must be at least 1")
    means = train(args.strength, args.steps)
    print(f"the mean reward went from {means[0]:.2f} to {means[-1]:.2f}")


if __name__ == "__main__":
    main()
