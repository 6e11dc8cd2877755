"""DistributedDataParallel and FSDP2: the step of several processes is that of one process on the whole batch."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from gradreg_optim import GradRegOptimizer

BATCH = 12  # divisible by 2 and 3
SETTINGS = {
    "eps": {"strength": 0.1, "eps": 0.05},
    "radius": {"strength": 0.1, "radius": 0.05},
    "clipped": {"strength": 0.1, "radius": 0.05, "g1_clip": 0.1, "g2_clip": 0.2},
    "central": {"strength": 0.1, "eps": 0.05, "method": "central"},
    "checked": {"strength": 0.1, "eps": 0.05, "check_every": 2, "shrink": True},
    "auto": {"strength": 0.1, "radius": "auto"},
    "bounded": {"strength": 5.0, "radius": 0.05, "max_penalty_ratio": 0.3, "exclude": "0."},
}
EVERY = {"strength": 0.1, "radius": 0.05, "every": 2}


def network():
    """Sizes that two and three ranks cannot share evenly; the bias of 1 leaves ranks without an element."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).double()


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, 5, generator=generator, dtype=torch.double), torch.randn(BATCH, generator=generator).double()


def closure_on(model, optimizer, inputs, targets, accumulation):
    def closure():
        optimizer.zero_grad()
        chunks = list(zip(inputs.chunk(accumulation), targets.chunk(accumulation), strict=True))
        for number, (x, y) in enumerate(chunks):
            is_last = number == len(chunks) - 1
            if hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(is_last)
            elif hasattr(model, "require_backward_grad_sync"):
                model.require_backward_grad_sync = is_last  # what no_sync() does
            loss = (model(x).squeeze(1) - y).square().mean() / accumulation
            loss.backward()
        return loss

    return closure


def train(model, names_of, inputs, targets, settings, accumulation, loop=False):
    """Three steps; the metrics of the last."""
    optimizer = GradRegOptimizer(torch.optim.AdamW(model.parameters(), lr=0.01), model=names_of, **settings)
    for _ in range(3):
        if loop:
            closure = closure_on(model, optimizer, inputs, targets, accumulation)
            for _ in optimizer.passes():
                closure()
            optimizer.step()
        else:
            optimizer.step(closure_on(model, optimizer, inputs, targets, accumulation))
    return {name: float(value) for name, value in optimizer.metrics.items()}


def rank_slice(tensor):
    return tensor.chunk(dist.get_world_size())[dist.get_rank()]


def ddp_case(settings, accumulation, bucket_views, loop=False):
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(network(), gradient_as_bucket_view=bucket_views)
    metrics = train(model, model, *map(rank_slice, data()), settings, accumulation, loop)
    return metrics, [parameter.detach() for parameter in model.parameters()]


def fsdp_case(settings, accumulation, replicas, loop=False):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    size = dist.get_world_size()
    shape, names = ((size, 1), ("replicate", "shard")) if replicas else ((size,), ("shard",))
    model = network()
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    metrics = train(model, model, *map(rank_slice, data()), settings, accumulation, loop)
    return metrics, [copy.deepcopy(parameter.detach().full_tensor()) for parameter in model.parameters()]


def assert_like_one_process(answers, settings):
    """Every rank has the weights and metrics of one process on the whole batch."""
    model = network()
    metrics = train(model, model, *data(), settings, 1)
    for rank_metrics, rank_weights in answers:
        for got, expected in zip(rank_weights, model.parameters(), strict=True):
            # float64 throughout; means over ranks round differently from the mean over the whole batch
            torch.testing.assert_close(got, expected.detach(), rtol=1e-9, atol=1e-12)
        assert rank_metrics == pytest.approx(metrics, rel=1e-6)


NAMES = [(2, name) for name in SETTINGS] + [(3, name) for name in ("clipped", "checked")]
EACH = pytest.mark.parametrize(("world", "name"), NAMES, indirect=["world"])


@EACH
def test_ddp_matches_one_process(world, name):
    """By closure and by loop, with and without accumulation and bucket views, no_sync included."""
    for accumulation, bucket_views, loop in ((1, False, True), (2, True, False)):
        assert_like_one_process(world.run(ddp_case, SETTINGS[name], accumulation, bucket_views, loop), SETTINGS[name])


@EACH
def test_fsdp2_matches_one_process(world, name):
    """Norms and inner products run over the shards of all ranks."""
    for accumulation, loop in ((1, False), (2, True)):
        assert_like_one_process(world.run(fsdp_case, SETTINGS[name], accumulation, False, loop), SETTINGS[name])


@EACH
def test_hybrid_sharding_counts_replicas_once(world, name):
    """With parameters replicated over one axis of the mesh, norms are those of one replica."""
    assert_like_one_process(world.run(fsdp_case, SETTINGS[name], 1, True), SETTINGS[name])


def test_plain_steps_between_regularized_ones(pair):
    """Three steps of ``every=2``, under DDP and FSDP2."""
    for case in (ddp_case, fsdp_case):
        assert_like_one_process(pair.run(case, EVERY, 1, False), EVERY)


def added_to_old_gradients(shards):
    """What is said about a closure that leaves the gradients from before where they are, and then about two that clear."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    model = network()[:1]
    if shards:
        fully_shard(model)
    else:
        model = DistributedDataParallel(model)
    inputs, _ = map(rank_slice, data())
    optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), strength=0.1, eps=0.05)

    def backward():
        model(inputs).square().mean().backward()

    def cleared(set_to_none):
        optimizer.zero_grad(set_to_none=set_to_none)
        backward()

    def message(closure):
        try:
            optimizer.step(closure)
        except RuntimeError as error:
            return str(error)
        return ""

    backward()
    return [message(closure) for closure in (backward, lambda: cleared(False), lambda: cleared(True))]


@pytest.mark.parametrize("shards", [False, True], ids=["DDP", "FSDP2"])
def test_a_closure_that_clears_nothing_is_refused(pair, shards):
    """On every rank; one that clears is not, whether it sets gradients to None or to 0."""
    for refused, *accepted in pair.run(added_to_old_gradients, shards):
        assert "added to gradients from before" in refused
        assert accepted == ["", ""]
