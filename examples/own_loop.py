"""Gradient regularization in a training loop of your own: with ``passes()``, and with a closure.

    python examples/own_loop.py

Both loops fit a linear regression with the default settings. Its loss is quadratic, so the regularized
gradient has a closed form, ∇L + γ·H·∇L. The script compares the weights after the last step with it, from the
step on in which γ was found.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from gradreg_optim import GradRegOptimizer

LEARNING_RATE = 0.1
MAX_NORM = 0.5
"""The bound on the norm of the combined gradient, for ``clip_grad_norm_``. It engages in the first steps."""
MICRO_BATCHES = 4
SETTLING = 10
"""The regularized steps in which ``strength="auto"`` finds γ, which is a number from then on."""


def make_problem() -> tuple[nn.Linear, Tensor, Tensor]:
    """A model, inputs and targets, the same at every call."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1, bias=False, dtype=torch.float64)
    inputs = torch.randn(64, 4, dtype=torch.float64)
    return model, inputs, inputs @ torch.tensor([[0.5], [-1.0], [1.5], [0.0]], dtype=torch.float64)


def train_with_passes(strength: float | str, steps: int) -> tuple[list[Tensor], float]:
    """Use ``passes()`` for micro-batches, and where the combined gradient is to be clipped before the step.

    Returns the weights before each step and after the last one, and γ.
    """
    model, inputs, targets = make_problem()
    optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=LEARNING_RATE), strength=strength)
    weights = [model.weight.detach().clone()]
    for step in range(steps):
        for x, y in zip(inputs.chunk(MICRO_BATCHES), targets.chunk(MICRO_BATCHES), strict=True):
            for _ in optimizer.passes(micro_batches=MICRO_BATCHES):  # the body runs at θ and at θ + ε·g1
                optimizer.zero_grad()  # of this micro-batch alone
                loss = mse_loss(model(x), y) / MICRO_BATCHES
                loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)  # .grad holds the combined gradient here
        optimizer.step()
        weights.append(model.weight.detach().clone())
        if step % 10 == 0:
            ratio, now = (float(optimizer.metrics[name]) for name in ("penalty_ratio", "strength"))
            print(f"step {step}: loss {loss.item():.4f}, penalty ratio {ratio:.3f}, strength {now:.3f}")
    return weights, optimizer.param_groups[0]["gradreg_strength"]


def train_with_closure(strength: float | str, steps: int) -> tuple[list[Tensor], float]:
    """Use a closure where there are no micro-batches, and nothing happens between gradient and step."""
    model, inputs, targets = make_problem()
    optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=LEARNING_RATE), strength=strength)
    weights = [model.weight.detach().clone()]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = mse_loss(model(inputs), targets)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)  # calls the closure at θ and at θ + ε·g1, and returns the loss at θ
        weights.append(model.weight.detach().clone())
    return weights, optimizer.param_groups[0]["gradreg_strength"]


def train_in_closed_form(
    weight: Tensor, strength: float, steps: int, micro_batches: int, max_norm: float | None
) -> Tensor:
    """The same training from ``weight`` on, with the mean of ∇L + γ·H·∇L over micro-batches written out."""
    _, inputs, targets = make_problem()
    for _ in range(steps):
        combined = torch.zeros_like(weight)
        for x, y in zip(inputs.chunk(micro_batches), targets.chunk(micro_batches), strict=True):
            g1, hessian = 2 * (weight @ x.T - y.T) @ x / len(x), 2 * x.T @ x / len(x)
            combined += (g1 + strength * g1 @ hessian) / micro_batches
        if max_norm is not None:
            bound = max_norm / (float(combined.norm()) + 1e-6)  # as clip_grad_norm_ does
            combined = combined * min(1.0, bound)
        weight = weight - LEARNING_RATE * combined
    return weight


def auto_or_number(text: str) -> float | str:
    """γ, as ``--strength`` takes it."""
    strength = text if text == "auto" else float(text)
    if not isinstance(strength, str) and not strength >= 0:
        raise argparse.ArgumentTypeError(f"{text} must be auto, or at least 0")
    return strength


def main() -> None:
    """Train with both loops and compare the weights."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--strength", type=auto_or_number, default="auto", help="γ, the weight of the penalty; auto finds it"
    )
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    begin = SETTLING if args.strength == "auto" else 0
    if args.steps <= begin:
        parser.error(f"--steps must be above {begin}")
    loops = ((train_with_passes, MICRO_BATCHES, MAX_NORM), (train_with_closure, 1, None))
    for train, micro_batches, max_norm in loops:
        weights, found = train(args.strength, args.steps)
        expected = train_in_closed_form(weights[begin], found, args.steps - begin, micro_batches, max_norm)
        # The rounding error of a difference of two float64 gradients, divided by ε = 1e-3.
        torch.testing.assert_close(weights[-1], expected, rtol=1e-9, atol=1e-9)
        print(f"{train.__name__}: γ = {found:.3f}, and the weights agree with the closed form")


if __name__ == "__main__":
    main()
