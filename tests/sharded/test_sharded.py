"""DistributedDataParallel and FSDP2: the step of several processes is that of one process on the whole batch."""

import copy

import pytest
import torch
import torch.distributed as dist
from distributed import World
from torch import nn

from gradreg_optim import GradRegOptimizer, MicroBatches

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
PARTS = {
    "half": {"strength": 0.1, "radius": 0.05, "fraction": 0.5},
    "whole": {"strength": 0.1, "radius": 0.05, "fraction": 1.0},
    "central": {"strength": 0.1, "eps": 0.05, "method": "central", "fraction": 0.5, "check_every": 2},
}
EXACT = {"strength": 0.1, "method": "exact"}


@pytest.fixture(scope="module", params=[2, 3])
def world(request):
    ranks = World(request.param)
    yield ranks
    ranks.close()


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


def micro_batches_on(model, inputs, targets, accumulation):
    def backward(chunk):
        loss = (model(chunk[0]).squeeze(1) - chunk[1]).square().mean() / accumulation
        loss.backward()
        return loss

    chunks = zip(inputs.chunk(accumulation), targets.chunk(accumulation), strict=True)
    return MicroBatches(backward, chunks, no_sync=getattr(model, "no_sync", None))


def train(model, names_of, inputs, targets, settings, accumulation, loop=False):
    """Three steps; the metrics of the last."""
    optimizer = GradRegOptimizer(torch.optim.AdamW(model.parameters(), lr=0.01), model=names_of, **settings)
    for _ in range(3):
        if "fraction" in settings:
            optimizer.step(micro_batches_on(model, inputs, targets, accumulation))
        elif loop:
            closure = closure_on(model, optimizer, inputs, targets, accumulation)
            for _ in optimizer.passes():
                closure()
            optimizer.step()
        else:
            optimizer.step(closure_on(model, optimizer, inputs, targets, accumulation))
    return {name: float(value) for name, value in optimizer.metrics.items()}


def reference(settings, world):
    """One process; with parts, on micro-batches that hold every rank's micro-batch at their position."""
    model, (inputs, targets) = network(), data()
    accumulation = 2 if "fraction" in settings else 1
    order = torch.arange(BATCH).view(world, accumulation, -1).transpose(0, 1).flatten()
    return train(model, model, inputs[order], targets[order], settings, accumulation), [
        parameter.detach() for parameter in model.parameters()
    ]


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
    metrics, weights = reference(settings, len(answers))
    for rank_metrics, rank_weights in answers:
        for got, expected in zip(rank_weights, weights, strict=True):
            # float64 throughout; means over ranks round differently from the mean over the whole batch
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
        assert rank_metrics == pytest.approx(metrics, rel=1e-6)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", SETTINGS)
def test_ddp_matches_one_process(world, name, accumulation):
    """Under DDP every rank ends at the weights and metrics of one process, bucket views and no_sync included."""
    for bucket_views in (False, True):
        assert_like_one_process(world.run(ddp_case, SETTINGS[name], accumulation, bucket_views), SETTINGS[name])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_exact_products_under_ddp(world, accumulation):
    """Ranks average their products as they average gradients, from the same hooks."""
    for bucket_views in (False, True):
        assert_like_one_process(world.run(ddp_case, EXACT, accumulation, bucket_views), EXACT)


def exact_of_shards():
    try:
        fsdp_case(EXACT, 1, False)
    except RuntimeError as error:
        return str(error)
    return ""


def test_exact_products_of_shards_are_refused(world):
    """FSDP2 reduces gradients in hooks that run once: every rank says so."""
    assert all("distributed over ranks (DTensor)" in message for message in world.run(exact_of_shards))


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", SETTINGS)
def test_fsdp2_matches_one_process(world, name, accumulation):
    """Under FSDP2 norms and inner products run over the shards of all ranks."""
    assert_like_one_process(world.run(fsdp_case, SETTINGS[name], accumulation, False), SETTINGS[name])


@pytest.mark.parametrize("name", PARTS)
def test_parts_of_a_step(world, name):
    """The difference of one micro-batch of two, whose gradient is reduced by itself."""
    for bucket_views in (False, True):
        assert_like_one_process(world.run(ddp_case, PARTS[name], 2, bucket_views), PARTS[name])
    assert_like_one_process(world.run(fsdp_case, PARTS[name], 2, False), PARTS[name])


def test_plain_steps_between_regularized_ones(world):
    """Three steps of ``every=2``, under DDP and FSDP2."""
    for case in (ddp_case, fsdp_case):
        assert_like_one_process(world.run(case, EVERY, 1, False), EVERY)


@pytest.mark.parametrize("name", SETTINGS)
def test_hybrid_sharding_counts_replicas_once(world, name):
    """With parameters replicated over one axis of the mesh, norms are those of one replica."""
    assert_like_one_process(world.run(fsdp_case, SETTINGS[name], 1, True), SETTINGS[name])


@pytest.mark.parametrize("name", SETTINGS)
def test_a_loop_over_passes_matches_one_process(world, name):
    """Without a closure, the body of the loop is what the closure was: under DDP and FSDP2 the step is the same."""
    assert_like_one_process(world.run(ddp_case, SETTINGS[name], 2, True, True), SETTINGS[name])
    assert_like_one_process(world.run(fsdp_case, SETTINGS[name], 2, False, True), SETTINGS[name])


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
def test_a_closure_that_clears_nothing_is_refused(world, shards):
    """On every rank; one that clears is not, whether it sets gradients to None or to 0."""
    for refused, *accepted in world.run(added_to_old_gradients, shards):
        assert "added to gradients from before" in refused
        assert accepted == ["", ""]
