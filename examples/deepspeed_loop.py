"""Gradient regularization in a loop with DeepSpeed, under ZeRO 1, 2 or 3.

    torchrun --nproc_per_node 2 examples/deepspeed_loop.py --stage 2
    DS_ACCELERATOR=cpu torchrun --nproc_per_node 2 examples/deepspeed_loop.py --stage 2      # without GPUs

The launcher ``deepspeed`` starts it as well. Each optimizer step uses all the data, split into micro-batches
and over processes. The settings are the defaults: the penalty is that of each micro-batch of all processes,
and the first steps find its weight γ. The loss is quadratic, so the regularized gradient has a closed form,
the mean of ∇ℓ + γ·H·∇ℓ over micro-batches. The script compares the weights after the last step with it, from
the step on in which γ was found.
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
SETTLING = 10
"""The regularized steps in which ``strength="auto"`` finds γ, which is a number from then on."""


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


def train(stage: int, strength: float | str, steps: int) -> tuple[list[Tensor], float]:
    """Use ``passes()`` for each micro-batch; returns the weights before and after each step, and γ."""
    model, inputs, targets = make_problem(dist.get_world_size())
    base = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=base, config=configuration(stage))
    optimizer = ZeroGradRegOptimizer(engine, strength=strength)
    own = slice(dist.get_rank(), None, dist.get_world_size())
    x, y = (rows[own].to(engine.device).view(ACCUMULATION, ROWS, -1) for rows in (inputs, targets))
    weights = [weight_of(model, stage)]
    for _ in range(steps):
        for micro_batch in range(ACCUMULATION):
            for _ in optimizer.passes(micro_batches=ACCUMULATION):  # the body runs at θ and at θ + ε·g1
                loss = mse_loss(engine(x[micro_batch]), y[micro_batch])
                engine.backward(loss)  # divides by gradient_accumulation_steps
                engine.step()  # held back, and taken once after the last micro-batch
        weights.append(weight_of(model, stage))
    if dist.get_rank() == 0:
        print(f"penalty ratio of the last step: {float(optimizer.metrics['penalty_ratio']):.3f}")
    return weights, optimizer.param_groups[0]["gradreg_strength"]


def weight_of(model: nn.Linear, stage: int) -> Tensor:
    """A copy of the whole weight, which stage 3 keeps in parts."""
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        return model.weight.detach().cpu().clone()


def train_in_closed_form(weight: Tensor, strength: float, steps: int) -> Tensor:
    """The same training from ``weight`` on, on one process, with the gradient written out in float64."""
    processes = dist.get_world_size()
    _, inputs, targets = make_problem(processes)
    weight, inputs, targets = weight.double(), inputs.double(), targets.double()
    rows = processes * ROWS  # of a micro-batch of all processes, which each takes its part of
    for _ in range(steps):
        combined = torch.zeros_like(weight)
        for x, y in zip(inputs.split(rows), targets.split(rows), strict=True):
            g1, hessian = 2 * (weight @ x.T - y.T) @ x / rows, 2 * x.T @ x / rows
            combined += (g1 + strength * g1 @ hessian) / ACCUMULATION
        weight = weight - LEARNING_RATE * combined * min(1.0, MAX_NORM / (float(combined.norm()) + 1e-6))
    return weight.float()


def auto_or_number(text: str) -> float | str:
    """γ, as ``--strength`` takes it."""
    strength = text if text == "auto" else float(text)
    if not isinstance(strength, str) and not strength >= 0:
        raise argparse.ArgumentTypeError(f"{text} must be auto, or at least 0")
    return strength


def main() -> None:
    """Train and compare the weights."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), default=2, help="of ZeRO")
    parser.add_argument(
        "--strength", type=auto_or_number, default="auto", help="γ, the weight of the penalty; auto finds it"
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--local_rank", type=int, help="given by DeepSpeed's launcher")
    args = parser.parse_args()
    begin = SETTLING if args.strength == "auto" else 0
    if args.steps <= begin:
        parser.error(f"--steps must be above {begin}")
    deepspeed.init_distributed()
    weights, found = train(args.stage, args.strength, args.steps)
    expected = train_in_closed_form(weights[begin], found, args.steps - begin)
    # The rounding error of a difference of two float32 gradients, divided by ε = 1e-3 and multiplied by γ.
    torch.testing.assert_close(weights[-1], expected, rtol=1e-4, atol=1e-4)
    if dist.get_rank() == 0:
        processes = f"processes: {dist.get_world_size()}"
        print(f"{processes}; γ = {found:.3f}, and the weights agree with the closed form")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
