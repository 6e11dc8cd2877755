"""DistributedDataParallel, FSDP2 and DeepSpeed's ZeRO on a device, in a process group of one rank.

Each is compared with the same training in closed form: least squares with a linear layer, on which a forward
difference is exact at any ε.
"""

from __future__ import annotations

import itertools
import os
import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
from devices import on_devices
from distributed import World
from torch import nn

from gradreg_optim import GradRegOptimizer

ROWS, FEATURES, OUTPUTS, STEPS, RATE = 16, 5, 3, 3, 0.1
SETTINGS = {"strength": 0.5, "eps": 0.1, "g1_clip": None, "g2_clip": None, "check_every": 0}
TOLERANCES = {"fp32": 1e-5, "fp16": 2**-10, "bf16": 2**-7}
"""Of weights near 1, of which 0.05 are the penalty's; gradients and differences have 24, 11 or 8 bits."""


@pytest.fixture(scope="module")
def rank():
    """A process of its own, in which DeepSpeed can choose its device when it is imported."""
    started = World(1)
    yield started
    started.close()


def prepare(device):
    """Let this process, which began with gloo, use ``device``."""
    os.environ["DS_ACCELERATOR"] = device
    warnings.simplefilter("ignore")  # of DeepSpeed about this machine
    if device == "cuda" and dist.get_backend() != "nccl":
        dist.destroy_process_group()
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)


def problem(device):
    """A layer, inputs and targets: multiples of 1/8, which every dtype represents."""
    random = torch.Generator().manual_seed(0)
    layer = nn.Linear(FEATURES, OUTPUTS)
    shapes = ((OUTPUTS, FEATURES), (OUTPUTS,), (ROWS, FEATURES), (ROWS, OUTPUTS))
    weight, bias, inputs, targets = (torch.randint(-8, 9, shape, generator=random) / 8 for shape in shapes)
    layer.weight.data, layer.bias.data = weight, bias
    return layer.to(device), inputs.to(device), targets.to(device)


def in_closed_form():
    """Weight and bias after three steps of SGD on ∇L + γ·H∇L, written out in float64."""
    layer, inputs, targets = problem("cpu")
    x = torch.cat([inputs, torch.ones(ROWS, 1)], 1).double()
    w = torch.cat([layer.weight, layer.bias[:, None]], 1).detach().double()
    hessian = 2 / (ROWS * OUTPUTS) * x.T @ x
    for _ in range(STEPS):
        g1 = 2 / (ROWS * OUTPUTS) * (w @ x.T - targets.double().T) @ x
        w = w - RATE * (g1 + SETTINGS["strength"] * g1 @ hessian)
    return [w[:, :-1], w[:, -1]]


def assert_close(found, tolerance):
    found = [one.cpu().double().view_as(other) for one, other in zip(found, in_closed_form(), strict=True)]
    torch.testing.assert_close(found, in_closed_form(), rtol=0, atol=tolerance)


def wrapper_of(engine, device):
    if engine == "DDP":
        return nn.parallel.DistributedDataParallel
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return partial(fully_shard, mesh=init_device_mesh(device, (1,)))


def torch_engine(device, engine, drive):
    """On the rank: three steps in float64, by a closure or by ``passes()``, perhaps in two equal micro-batches."""
    prepare(device)
    layer, inputs, targets = problem(device)
    model = wrapper_of(engine, device)(layer.double())
    optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=RATE), **SETTINGS)

    count = 2 if drive == "micro-batches" else 1

    def closure():
        optimizer.zero_grad()
        loss = (model(inputs.double()) - targets.double()).square().mean() / count
        loss.backward()
        return loss

    for _ in range(STEPS):
        if drive != "closure":
            for _ in range(count):
                for _ in optimizer.passes(micro_batches=count):
                    closure()
            optimizer.step()
        else:
            optimizer.step(closure)
    weights = [parameter.detach() for parameter in model.parameters()]
    whole = [weight.full_tensor() if hasattr(weight, "full_tensor") else weight for weight in weights]
    assert_close(whole, 1e-12)


def zero_engine(device, stage, precision, offload, count=1):
    """On the rank: three steps of a DeepSpeed engine, in equal micro-batches; its masters are compared."""
    prepare(device)
    import deepspeed
    from deepspeed.utils import logger, safe_get_full_fp32_param

    from gradreg_optim import ZeroGradRegOptimizer

    logger.setLevel("ERROR")
    layer, inputs, targets = problem(device)
    placed = {"offload_optimizer": {"device": "cpu"}} if offload else {}
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **placed},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if precision != "fp32":
        config[precision] = {"enabled": True} | ({"initial_scale_power": 8} if precision == "fp16" else {})
    if device == "cpu":
        config["communication_data_type"] = "fp32"  # gloo sums no half precision
    base = torch.optim.SGD(layer.parameters(), lr=RATE)
    engine, *_ = deepspeed.initialize(model=layer, optimizer=base, config=config)
    optimizer = ZeroGradRegOptimizer(engine, **SETTINGS)
    dtype = next(engine.module.parameters()).dtype

    def closure():
        loss = (engine(inputs.to(dtype)).float() - targets).square().mean() / count
        engine.backward(loss)
        engine.step()
        return loss

    for _ in range(STEPS):
        if count == 1:
            optimizer.step(closure)
            continue
        for _ in range(count):
            for _ in optimizer.passes(micro_batches=count):
                closure()
        optimizer.step()
    masters = [safe_get_full_fp32_param(parameter).detach().clone() for parameter in engine.module.parameters()]
    engine.destroy()
    assert_close(masters, TOLERANCES[precision])


DRIVEN = [*itertools.product(("DDP", "FSDP2"), ("closure", "passes", "micro-batches"))]


@on_devices("engine", "drive", cpu=[("DDP", "micro-batches"), ("FSDP2", "closure")], cuda=DRIVEN)
def test_torch_engines(rank, device, engine, drive):
    """The weights are those of the closed form, in float64."""
    rank.run(torch_engine, device, engine, drive)


@on_devices(
    "stage",
    "precision",
    "offload",
    "count",
    cpu=[(2, "fp32", False, 2)],
    cuda=itertools.product((1, 2, 3), TOLERANCES, (False, True), (1, 2)),
)
def test_zero(rank, device, stage, precision, offload, count):
    """The masters are those of the closed form, within what the precision rounds."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is an extra")
    rank.run(zero_engine, device, stage, precision, offload, count)
