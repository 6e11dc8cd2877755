"""Engines that a step could not be right under are refused by name; tensor parallelism and meshes of two axes are right."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from test_sharded import SETTINGS, data, network, rank_slice, train
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, post_localSGD_hook, powerSGD_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from gradreg_optim import GradRegOptimizer


def said_about(model, steps=1, **settings):
    """The error or warning of some steps, and how often the closure ran."""
    optimizer = GradRegOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.01), **{"strength": 0.1, "check_every": 0, **settings}
    )
    inputs, _ = map(rank_slice, data())
    calls = []

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        model(inputs).square().mean().backward()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            for _ in range(steps):
                optimizer.step(closure)
        except ValueError as error:
            return str(error), len(calls)
    return "; ".join(str(warning.message) for warning in caught), len(calls)


def fully_sharded(strategy, use_orig_params, **settings):
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.13 calls FSDP1 deprecated
        model = FullyShardedDataParallel(
            network(),
            use_orig_params=use_orig_params,
            device_id=torch.device("cpu"),
            sharding_strategy=ShardingStrategy[strategy],
        )
        return said_about(model, **settings)


@pytest.mark.parametrize("use_orig_params", [True, False])
@pytest.mark.parametrize("strategy", ["FULL_SHARD", "SHARD_GRAD_OP"])
def test_fsdp1_is_refused(pair, strategy, use_orig_params):
    """Its parameters are shards without a mesh: every rank says so before the first pass."""
    for message, calls in pair.run(fully_sharded, strategy, use_orig_params):
        assert "shards of FSDP1" in message
        assert "Use FSDP2" in message
        assert calls == 0


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1_without_shards_or_without_penalty_runs(pair, use_orig_params):
    """Where every rank holds all of each parameter nothing is missing from a sum; without penalty there is none."""
    assert pair.run(fully_sharded, "NO_SHARD", use_orig_params) == [("", 2)] * 2
    assert pair.run(fully_sharded, "FULL_SHARD", use_orig_params, strength=0.0) == [("", 1)] * 2


class ErrorFeedback:
    """A communication hook that rounds gradients and adds what was lost to the next ones."""

    def __init__(self):
        self.lost = {"began": torch.zeros(1)}  # found in the first step and in the second

    def send(self, _state, bucket):
        wanted = bucket.buffer() + self.lost.get(bucket.index(), 0.0)
        sent = wanted.to(torch.bfloat16).to(wanted.dtype)
        self.lost[bucket.index()] = wanted - sent
        return default_hooks.allreduce_hook(None, bucket.buffer().copy_(sent) is None or bucket)


def register(model, name):
    """Register one of the hooks by name: hooks do not travel between processes."""
    group = dist.group.WORLD
    power = powerSGD_hook.PowerSGDState(group, matrix_approximation_rank=1, start_powerSGD_iter=10)
    state, hook = {
        "PowerSGD": (power, powerSGD_hook.powerSGD_hook),
        "batched PowerSGD": (power, powerSGD_hook.batched_powerSGD_hook),
        "PowerSGD in fp16": (power, default_hooks.fp16_compress_wrapper(powerSGD_hook.powerSGD_hook)),
        "allreduce": (group, default_hooks.allreduce_hook),
        "fp16": (group, default_hooks.fp16_compress_hook),
        "fp16 around another": (group, default_hooks.fp16_compress_wrapper(default_hooks.allreduce_hook)),
        "local SGD": (post_localSGD_hook.PostLocalSGDState(group, None, 10), post_localSGD_hook.post_localSGD_hook),
    }[name]
    model.register_comm_hook(state, hook)


def hooked(name):
    model = DistributedDataParallel(network())
    register(model, name)
    return said_about(model, steps=3, eps=1e-2)


@pytest.mark.parametrize("name", ["PowerSGD", "batched PowerSGD", "PowerSGD in fp16"])
def test_power_sgd_is_refused(pair, name):
    """Also before it begins to compress, and inside another hook: no pass runs."""
    for message, calls in pair.run(hooked, name):
        assert "PowerSGD compresses gradients" in message
        assert calls == 0


def error_feedback():
    model = DistributedDataParallel(network())
    model.register_comm_hook(None, ErrorFeedback().send)
    return said_about(model, eps=1e-3, check_every=None)


def test_error_feedback_shows_in_the_check(pair):
    """A hook that adds what it lost to later gradients: the check of the first step measures that loss."""
    for message, _ in pair.run(error_feedback):
        assert "the self-check is" in message


@pytest.mark.parametrize("name", ["allreduce", "fp16", "fp16 around another", "local SGD"])
def test_hooks_without_memory_are_welcome(pair, name):
    """Nothing is said about hooks that send each gradient as it is, or rounded."""
    assert pair.run(hooked, name) == [("", 6)] * 2


def hooked_elsewhere():
    other = DistributedDataParallel(network())
    register(other, "PowerSGD")
    return said_about(DistributedDataParallel(network()))


def test_the_hooks_of_another_model_do_not_matter(pair):
    """What is refused is the communication of the wrapper's own parameters."""
    assert pair.run(hooked_elsewhere) == [("", 2)] * 2


class Block(nn.Module):
    """A layer norm and two linear layers that tensor parallelism shards by columns and by rows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(5)
        self.up = nn.Linear(5, 8)
        self.down = nn.Linear(8, 1)
        self.double()

    def forward(self, x):
        return self.down(torch.tanh(self.up(self.norm(x))))


def parallel_case(settings, kind):
    """The block on all ranks: by tensor parallelism alone, with a sharded sequence, or on a mesh of two axes with FSDP2."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    size, model = dist.get_world_size(), Block()
    by_columns, by_rows = ColwiseParallel(), RowwiseParallel()
    if kind == "tensor":
        mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("tensor",))
        parallelize_module(model, mesh, {"up": by_columns, "down": by_rows})
        inputs, targets = data()
    else:
        shape = (1, size) if kind == "sequence" else (2, size // 2)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
        plan = {
            "norm": SequenceParallel(sequence_dim=0),
            "up": ColwiseParallel(input_layouts=Shard(0)),
            "down": RowwiseParallel(output_layouts=Replicate()),
        }
        parallelize_module(model, mesh["tensor"], plan)
        parallelize_module(
            model, mesh["tensor"], PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(0))
        )
        inputs, targets = data()
        if kind == "both":
            fully_shard(model, mesh=mesh["data"])
            place = mesh["data"].get_local_rank()
            inputs, targets = inputs.chunk(2)[place], targets.chunk(2)[place]
    metrics = train(model, model, inputs, targets, settings, 1)
    return metrics, [copy.deepcopy(whole(parameter.detach())) for parameter in model.parameters()]


def whole(parameter):
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def on_one_process(settings):
    model = Block()
    return train(model, model, *data(), settings, 1), [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize(
    ("world", "kind", "name"),
    [
        (2, "tensor", "clipped"),
        (2, "sequence", "central"),
        (4, "both", "clipped"),
        (4, "both", "central"),
        (4, "both", "checked"),
        (4, "sequence", "checked"),
    ],
    indirect=["world"],
)
def test_tensor_parallelism_matches_one_process(world, kind, name):
    """Shards, replicas and summands of parameters, also of a mesh with two axes, are counted once in every sum."""
    metrics, expected = on_one_process(SETTINGS[name])
    for rank_metrics, rank_weights in world.run(parallel_case, SETTINGS[name], kind):
        for got, wanted in zip(rank_weights, expected, strict=True):
            # float64 throughout; sums over ranks round differently from sums over the whole batch
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
        assert rank_metrics == pytest.approx(metrics, rel=1e-6)


def on_two_meshes():
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("data", "tensor"))
    model = parallelize_module(Block(), mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    return said_about(model)


def test_parameters_on_several_meshes_are_refused(pair):
    """A norm that tensor parallelism leaves out lies on the other axis alone."""
    for message, calls in pair.run(on_two_meshes):
        assert "lie on 2 device meshes" in message
        assert calls == 0
