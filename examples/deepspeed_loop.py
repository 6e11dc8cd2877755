"""Gradient regularization in a loop with DeepSpeed, under ZeRO 1, 2 or 3.

    torchrun --nproc_per_node 2 examples/deepspeed_loop.py --stage 2
    DS_ACCELERATOR=cpu torchrun --nproc_per_node 2 examples/deepspeed_loop.py --stage 2      # without GPUs

The launcher ``deepspeed`` starts it as well. Each optimizer step uses all the data, split into micro-batches
and over processes. The loss is quadratic, so the regularized gradient has a closed form, ∇L + γ·H·∇L, and the
script checks the weights after the last step against it.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

try:
    import deepspeed
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"The package {missing.name!r} is not installed: pip install -e '.[deepspeed]'"
    ) from missing
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from gradreg_optim import ZeroGradRegOptimizer

LEARNING_RATE = 0.1
MAX_NORM = 0.5
ACCUMULATION = 2
ROWS = 16
"""Rows of a micro-batch on each process."""


def make_problem(processes: int) -> tuple[nn.Linear, Tensor, Tensor]:
    """A model, inputs and targets, the same at every call."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1, bias=False)
    inputs = torch.randn(processes * ACCUMULATION * ROWS, 4)
    return model, inputs, inputs @ torch.tensor([[0.5], [-1.0], [1.5], [0.0]])


def configuration(stage: int) -> dict[str, Any]:
    """DeepSpeed's settings; ``gradient_clipping`` acts on the combined gradient."""
    return {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": MAX_NORM,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,  # plain SGD
    }


def train(stage: int, strength: float, steps: int) -> Tensor:
    """Use ``passes()``; its body is the usual inner loop over one accumulation window."""
    model, inputs, targets = make_problem(dist.get_world_size())
    base = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=base, config=configuration(stage))
    optimizer = ZeroGradRegOptimizer(engine, strength=strength)
    own = slice(dist.get_rank(), None, dist.get_world_size())
    x, y = (rows[own].to(engine.device).view(ACCUMULATION, ROWS, -1) for rows in (inputs, targets))
    for _ in range(steps):
        for _ in optimizer.passes():  # the body runs at θ and again at θ + ε·g1
            for micro_batch in range(ACCUMULATION):
                loss = mse_loss(engine(x[micro_batch]), y[micro_batch])
                engine.backward(loss)
                engine.step()  # held back at the end of the window, and taken once after the loop
    if dist.get_rank() == 0:
        print(f"penalty ratio of the last step: {float(optimizer.metrics['penalty_ratio']):.3f}")
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        return model.weight.detach().cpu().clone()


def train_in_closed_form(strength: float, steps: int) -> Tensor:
    """The same training on one process, with the gradient ∇L + γ·H·∇L written out in float64."""
    model, inputs, targets = make_problem(dist.get_world_size())
    weight, inputs, targets = model.weight.detach().double(), inputs.double(), targets.double()
    hessian = 2 * inputs.T @ inputs / len(inputs)
    for _ in range(steps):
        g1 = 2 * (weight @ inputs.T - targets.T) @ inputs / len(inputs)
        combined = g1 + strength * g1 @ hessian
        weight = weight - LEARNING_RATE * combined * min(1.0, MAX_NORM / (float(combined.norm()) + 1e-6))
    return weight.float()


def main() -> None:
    """Train and compare the weights."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), default=2, help="of ZeRO")
    parser.add_argument("--strength", type=float, default=0.1, help="γ, the weight of the penalty")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--local_rank", type=int, help="given by DeepSpeed's launcher")
    args = parser.parse_args()
    if args.strength < 0 or args.steps < 1:
        parser.error("--strength must be at least 0, and --steps at least 1")
    deepspeed.init_distributed()
    found = train(args.stage, args.strength, args.steps)
    # The rounding error of a difference of two float32 gradients, divided by ε = 1e-3 and multiplied by γ.
    torch.testing.assert_close(found, train_in_closed_form(args.strength, args.steps), rtol=1e-4, atol=1e-4)
    if dist.get_rank() == 0:
        print(f"processes: {dist.get_world_size()}; the weights agree with the closed form")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
