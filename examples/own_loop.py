"""Gradient regularization in a training loop of your own: with ``passes()``, and with a closure.

    python examples/own_loop.py

Both loops fit a linear regression. Its loss is quadratic, so the regularized gradient has a closed form,
∇L + γ·H·∇L, and the script checks the weights after the last step against it.
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


def make_problem() -> tuple[nn.Linear, Tensor, Tensor]:
    """A model, inputs and targets, the same at every call."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1, bias=False, dtype=torch.float64)
    inputs = torch.randn(64, 4, dtype=torch.float64)
    return model, inputs, inputs @ torch.tensor([[0.5], [-1.0], [1.5], [0.0]], dtype=torch.float64)


def train_with_passes(strength: float, steps: int) -> Tensor:
    """Use ``passes()`` where the combined gradient is to be clipped, logged or unscaled before the step."""
    model, inputs, targets = make_problem()
    optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=LEARNING_RATE), strength=strength)
    for step in range(steps):
        for _ in optimizer.passes():  # the body runs at θ and again at θ + ε·g1
            optimizer.zero_grad()
            loss = mse_loss(model(inputs), targets)
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)  # .grad holds the combined gradient here
        optimizer.step()
        if step % 10 == 0:
            print(
                f"step {step}: loss {loss.item():.4f}, penalty ratio "
                f"{float(optimizer.metrics['penalty_ratio']):.3f}"
            )
    return model.weight.detach()


def train_with_closure(strength: float, steps: int) -> Tensor:
    """Use a closure where nothing happens between the gradient and the step."""
    model, inputs, targets = make_problem()
    optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=LEARNING_RATE), strength=strength)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = mse_loss(model(inputs), targets)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)  # calls the closure twice and returns the loss at θ
    return model.weight.detach()


def train_in_closed_form(strength: float, steps: int, max_norm: float | None) -> Tensor:
    """The same training with the gradient ∇L + γ·H·∇L written out."""
    model, inputs, targets = make_problem()
    weight, hessian = model.weight.detach(), 2 * inputs.T @ inputs / len(inputs)
    for _ in range(steps):
        g1 = 2 * (weight @ inputs.T - targets.T) @ inputs / len(inputs)
        combined = g1 + strength * g1 @ hessian
        if max_norm is not None:
            # As clip_grad_norm_ does.
            combined = combined * min(1.0, max_norm / (float(combined.norm()) + 1e-6))
        weight = weight - LEARNING_RATE * combined
    return weight


def main() -> None:
    """Train three times and compare the weights."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strength", type=float, default=0.1, help="γ, the weight of the penalty")
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    if args.strength < 0 or args.steps < 1:
        parser.error("--strength must be at least 0, and --steps at least 1")
    for train, max_norm in ((train_with_passes, MAX_NORM), (train_with_closure, None)):
        expected = train_in_closed_form(args.strength, args.steps, max_norm)
        # The rounding error of a difference of two float64 gradients, divided by ε = 1e-3.
        torch.testing.assert_close(train(args.strength, args.steps), expected, rtol=1e-9, atol=1e-9)
        print(f"{train.__name__}: the weights agree with the closed form")


if __name__ == "__main__":
    main()
