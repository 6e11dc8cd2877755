"""Gradient regularization in a loop with Accelerate, with gradient accumulation and clipping.

    python examples/accelerate_loop.py
    accelerate launch --num_processes 2 examples/accelerate_loop.py      # on two GPUs
    torchrun --nproc_per_node 2 examples/accelerate_loop.py --cpu        # on two CPU processes

Each optimizer step uses all the data, split into micro-batches and over processes. The settings are the
defaults: the penalty is that of each micro-batch, and the first steps find its weight γ. The loss is
quadratic, so the regularized gradient has a closed form, the mean of ∇ℓ + γ·H·∇ℓ over micro-batches. The
script compares the weights after the last step with it, from the step on in which γ was found.

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
SETTLING = 10
"""The regularized steps in which ``strength="auto"`` finds γ, which is a number from then on."""


def make_problem() -> tuple[nn.Linear, Tensor, Tensor]:
    """A model, inputs and targets, the same at every call."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1, bias=False, dtype=torch.float64)
    inputs = torch.randn(SIZE, 4, dtype=torch.float64)
    return model, inputs, inputs @ torch.tensor([[0.5], [-1.0], [1.5], [0.0]], dtype=torch.float64)


def train(accelerator: Accelerator, strength: float | str, epochs: int) -> tuple[list[Tensor], float]:
    """Take one optimizer step an epoch; returns the weights before each and after the last one, and γ."""
    accumulation = accelerator.gradient_accumulation_steps
    model, inputs, targets = make_problem()
    optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=LEARNING_RATE), strength=strength)
    loader = DataLoader(TensorDataset(inputs, targets), SIZE // (accumulation * accelerator.num_processes))
    model, prepared, loader = accelerator.prepare(model, optimizer, loader)
    weight = accelerator.unwrap_model(model).weight
    weights = [weight.detach().cpu().clone()]
    for _ in range(epochs):
        for x, y in loader:  # the micro-batches of one step; no accelerator.accumulate
            for _ in optimizer.passes(micro_batches=accumulation):  # the body runs at θ and at θ + ε·g1
                prepared.zero_grad()  # of this micro-batch alone
                loss = mse_loss(model(x), y)
                accelerator.backward(loss)  # divides by gradient_accumulation_steps
        accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)  # .grad holds the combined gradient here
        prepared.step()
        weights.append(weight.detach().cpu().clone())
    accelerator.print(f"penalty ratio of the last step: {float(optimizer.metrics['penalty_ratio']):.3f}")
    return weights, optimizer.param_groups[0]["gradreg_strength"]


def train_in_closed_form(weight: Tensor, strength: float, steps: int, micro_batches: int) -> Tensor:
    """The same training from ``weight`` on, on one process, with the gradient written out."""
    _, inputs, targets = make_problem()
    for _ in range(steps):
        combined = torch.zeros_like(weight)
        for x, y in zip(inputs.chunk(micro_batches), targets.chunk(micro_batches), strict=True):
            g1, hessian = 2 * (weight @ x.T - y.T) @ x / len(x), 2 * x.T @ x / len(x)
            combined += (g1 + strength * g1 @ hessian) / micro_batches
        weight = weight - LEARNING_RATE * combined * min(1.0, MAX_NORM / (float(combined.norm()) + 1e-6))
    return weight


def auto_or_number(text: str) -> float | str:
    """γ, as ``--strength`` takes it."""
    strength = text if text == "auto" else float(text)
    if not isinstance(strength, str) and not strength >= 0:
        raise argparse.ArgumentTypeError(f"{text} must be auto, or at least 0")
    return strength


def main() -> None:
    """Train and compare the weights."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--strength", type=auto_or_number, default="auto", help="γ, the weight of the penalty; auto finds it"
    )
    parser.add_argument("--epochs", type=int, default=40, help="optimizer steps")
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches of a step on each process")
    parser.add_argument("--cpu", action="store_true", help="leave GPUs alone")
    args = parser.parse_args()
    begin = SETTLING if args.strength == "auto" else 0
    if args.epochs <= begin or args.accumulation < 1:
        parser.error(f"--epochs must be above {begin}, --accumulation at least 1")
    accelerator = Accelerator(cpu=args.cpu, gradient_accumulation_steps=args.accumulation)
    weights, found = train(accelerator, args.strength, args.epochs)
    micro_batches = args.accumulation * accelerator.num_processes
    expected = train_in_closed_form(weights[begin], found, args.epochs - begin, micro_batches)
    # The rounding error of a difference of two float64 gradients, divided by ε = 1e-3.
    torch.testing.assert_close(weights[-1], expected, rtol=1e-9, atol=1e-9)
    processes = f"processes: {accelerator.num_processes}"
    accelerator.print(f"{processes}; γ = {found:.3f}, and the weights agree with the closed form")
    accelerator.end_training()


if __name__ == "__main__":
    main()
