"""Checks of gpu.py: DistributedDataParallel, FSDP2 and DeepSpeed's ZeRO in a process group of one rank.

Each is compared with the same training in closed form: least squares with a linear layer, on which a forward difference is
exact at any ε.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.cost.gpu_checks import Check, expect, needed
from gradreg_optim import GradRegOptimizer

ROWS, FEATURES, OUTPUTS, STEPS, RATE = 16, 5, 3, 3, 0.1
SETTINGS: dict[str, Any] = {"strength": 0.5, "eps": 0.1, "g1_clip": None, "g2_clip": None, "check_every": 0}
TOLERANCES = {"fp32": 1e-5, "fp16": 2**-10, "bf16": 2**-7}
"""Of weights near 1, of which 0.05 are the penalty's: gradients, and their difference times γ/ε, have 24, 11 or 8 bits."""


@contextmanager
def surroundings(device: torch.device) -> Iterator[None]:
    """A process group of one rank: NCCL on a GPU, else gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_ACCELERATOR": device.type, **alone}
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()
        for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):  # 70 MB of memory
            left.unlink(missing_ok=True)


def problem(device: torch.device) -> tuple[nn.Linear, Tensor, Tensor]:
    """A layer, inputs and targets: multiples of 1/8, which every dtype represents."""
    random = torch.Generator().manual_seed(0)
    layer = nn.Linear(FEATURES, OUTPUTS)
    numbers = [torch.randint(-8, 9, shape, generator=random) / 8 for shape in ((OUTPUTS, FEATURES), (OUTPUTS,))]
    layer.weight.data, layer.bias.data = numbers
    inputs, targets = (torch.randint(-8, 9, (ROWS, n), generator=random) / 8 for n in (FEATURES, OUTPUTS))
    return layer.to(device), inputs.to(device), targets.to(device)


def in_closed_form(device: torch.device) -> list[Tensor]:
    """Weight and bias after three steps of SGD on ∇L + γ·H∇L, written out in float64."""
    layer, inputs, targets = problem(device)
    x = torch.cat([inputs, torch.ones(ROWS, 1, device=device)], 1).double()
    w = torch.cat([layer.weight, layer.bias[:, None]], 1).detach().double()
    hessian = 2 / (ROWS * OUTPUTS) * x.T @ x
    for _ in range(STEPS):
        g1 = 2 / (ROWS * OUTPUTS) * (w @ x.T - targets.double().T) @ x
        w = w - RATE * (g1 + SETTINGS["strength"] * g1 @ hessian)
    return [w[:, :-1], w[:, -1]]


def compare(found: list[Tensor], device: torch.device, tolerance: float) -> float:
    """The largest error of the weights, if it is within the tolerance."""
    pairs = zip(found, in_closed_form(device), strict=True)
    error = max(float((one.to(device).double().view_as(other) - other).abs().max()) for one, other in pairs)
    expect(error < tolerance, f"the weights are off by {error:.1e} after {STEPS} steps, more than {tolerance:.1e}")
    return error


def wrapped(device: torch.device, wrap: Callable[[nn.Module], nn.Module]) -> str:
    """Three steps in float64 of the layer that ``wrap`` returns, by a closure and by ``passes()``."""
    worst = 0.0
    for loops in (False, True):
        layer, inputs, targets = problem(device)
        model = wrap(layer.double())
        optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=RATE), **SETTINGS)

        def closure(model: Any = model, optimizer: Any = optimizer, x: Any = inputs, y: Any = targets) -> Tensor:
            optimizer.zero_grad()
            loss = (model(x.double()) - y.double()).square().mean()
            loss.backward()
            return loss

        for _ in range(STEPS):
            if loops:
                [closure() for _ in optimizer.passes()]
                optimizer.step()
            else:
                optimizer.step(closure)
        weights = [parameter.detach() for parameter in model.parameters()]
        whole = [weight.full_tensor() if hasattr(weight, "full_tensor") else weight for weight in weights]
        worst = max(worst, compare(whole, device, 1e-12))
    return f"float64, {worst:.0e}"


def ddp(device: torch.device) -> str:
    return wrapped(device, nn.parallel.DistributedDataParallel)


def fsdp2(device: torch.device) -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return wrapped(device, partial(fully_shard, mesh=init_device_mesh(device.type, (1,))))


def zero(device: torch.device, *, stage: int, offload: bool) -> str:
    """Three steps of an engine in each precision; the masters are compared."""
    needed("deepspeed")
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    errors = {precision: zero_error(device, stage, offload, precision) for precision in TOLERANCES}
    return ", ".join(f"{precision} {error:.0e}" for precision, error in errors.items())


def zero_error(device: torch.device, stage: int, offload: bool, precision: str) -> float:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    from gradreg_optim import ZeroGradRegOptimizer

    layer, inputs, targets = problem(device)
    placed: dict[str, Any] = {"offload_optimizer": {"device": "cpu"}} if offload else {}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **placed},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if precision != "fp32":
        config[precision] = {"enabled": True} | ({"initial_scale_power": 8} if precision == "fp16" else {})
    if device.type == "cpu":
        config["communication_data_type"] = "fp32"  # gloo sums no half precision
    base = torch.optim.SGD(layer.parameters(), lr=RATE)
    engine, *_ = deepspeed.initialize(model=layer, optimizer=base, config=config)
    optimizer = ZeroGradRegOptimizer(engine, **SETTINGS)
    dtype = next(engine.module.parameters()).dtype

    def closure() -> Tensor:
        loss = (engine(inputs.to(dtype)).float() - targets).square().mean()
        engine.backward(loss)
        engine.step()
        return loss

    for _ in range(STEPS):
        optimizer.step(closure)
    masters = [safe_get_full_fp32_param(parameter).detach().clone() for parameter in engine.module.parameters()]
    engine.destroy()
    return compare(masters, device, TOLERANCES[precision])


CHECKS: dict[str, Check] = {
    "DistributedDataParallel": ddp,
    "FSDP2": fsdp2,
    **{f"ZeRO {stage}": partial(zero, stage=stage, offload=False) for stage in (1, 2, 3)},
    **{f"ZeRO {stage}, optimizer on the CPU": partial(zero, stage=stage, offload=True) for stage in (1, 2, 3)},
}
