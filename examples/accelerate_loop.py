"""Gradient regularization in a loop with Accelerate, with gradient accumulation and clipping.

    python examples/accelerate_loop.py
    accelerate launch --num_processes 2 examples/accelerate_loop.py      # on two GPUs
    torchrun --nproc_per_node 2 examples/accelerate_loop.py --cpu        # on two CPU processes

Each optimizer step uses all the data, split into micro-batches and over processes. The loss is quadratic,
so the regularized gradient has a closed form, ∇L + γ·H·∇L, and the script checks the weights after the
last step against it.

In fp16, Accelerate scales the loss. Then leave the optimizer out of ``prepare``, give it
``scaler=accelerator.scaler``, and call ``accelerator.scaler.update()`` after each step.
"""

from __future__ import annotations

import argparse

import torch

try:
    from accelerate import Accelerator
except ModuleNotFoundError as missing:
    raise SystemExit(f"The package {missing.name!r} is not installed: pip install -e '.[trl]'") from missing
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from gradreg_optim import GradRegOptimizer

LEARNING_RATE = 0.1
MAX_NORM = 0.5
SIZE = 64


def make_problem() -> tuple[nn.Linear, Tensor, Tensor]:
    """A model, inputs and targets, the same at every call."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1, bias=False, dtype=torch.float64)
    inputs = torch.randn(SIZE, 4, dtype=torch.float64)
    return model, inputs, inputs @ torch.tensor([[0.5], [-1.0], [1.5], [0.0]], dtype=torch.float64)


def train(accelerator: Accelerator, strength: float, epochs: int) -> Tensor:
    """Take one optimizer step an epoch."""
    accumulation = accelerator.gradient_accumulation_steps
    model, inputs, targets = make_problem()
    optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=LEARNING_RATE), strength=strength)
    loader = DataLoader(TensorDataset(inputs, targets), SIZE // (accumulation * accelerator.num_processes))
    model, prepared, loader = accelerator.prepare(model, optimizer, loader)
    for _ in range(epochs):
        micro_batches = list(loader)  # those of one step
        for _ in optimizer.passes():  # the body runs at θ and again at θ + ε·g1
            prepared.zero_grad()
            for x, y in micro_batches:
                with accelerator.accumulate(model):  # inside the pass: both passes accumulate
                    loss = mse_loss(model(x), y)
                    accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)  # .grad holds the combined gradient here
        prepared.step()
    accelerator.print(f"penalty ratio of the last step: {float(optimizer.metrics['penalty_ratio']):.3f}")
    return accelerator.unwrap_model(model).weight.detach().cpu()


def train_in_closed_form(strength: float, steps: int) -> Tensor:
    """The same training on one process, with the gradient ∇L + γ·H·∇L written out."""
    model, inputs, targets = make_problem()
    weight, hessian = model.weight.detach(), 2 * inputs.T @ inputs / SIZE
    for _ in range(steps):
        g1 = 2 * (weight @ inputs.T - targets.T) @ inputs / SIZE
        combined = g1 + strength * g1 @ hessian
        weight = weight - LEARNING_RATE * combined * min(1.0, MAX_NORM / (float(combined.norm()) + 1e-6))
    return weight


def main() -> None:
    """Train and compare the weights."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strength", type=float, default=0.1, help="γ, the weight of the penalty")
    parser.add_argument("--epochs", type=int, default=40, help="optimizer steps")
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches of a step on each process")
    parser.add_argument("--cpu", action="store_true", help="leave GPUs alone")
    args = parser.parse_args()
    if args.strength < 0 or min(args.epochs, args.accumulation) < 1:
        parser.error("--strength must be at least 0, --epochs and --accumulation at least 1")
    accelerator = Accelerator(cpu=args.cpu, gradient_accumulation_steps=args.accumulation)
    found = train(accelerator, args.strength, args.epochs)
    # The rounding error of a difference of two float64 gradients, divided by ε = 1e-3.
    torch.testing.assert_close(found, train_in_closed_form(args.strength, args.epochs), rtol=1e-9, atol=1e-9)
    accelerator.print(f"processes: {accelerator.num_processes}; the weights agree with the closed form")
    accelerator.end_training()


if __name__ == "__main__":
    main()
