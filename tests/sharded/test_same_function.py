"""All passes are passes of one function under DDP, FSDP2 and ZeRO too: buffers, and losses that draw something."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from gradreg_optim import GradRegOptimizer

ENGINES = ["ddp", "fsdp2", "zero 1", "zero 3"]


class Running(nn.Module):
    """Divides by a running mean square; ``mask`` never moves."""

    def __init__(self, size):
        super().__init__()
        self.register_buffer("mask", torch.ones(size))
        self.register_buffer("scale", torch.zeros(size))

    def forward(self, x):
        self.scale.mul_(0.5).add_(x.detach().square().mean(0), alpha=0.5)
        return self.mask * x / (1 + self.scale)


def built(engine, **settings):
    """The callable model, its running layer, the optimizer, and what runs backward and the rest of a micro-batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), Running(7), nn.Linear(7, 1))
    running = model[2]
    if engine.startswith("zero"):
        import deepspeed
        from zero_worker import make_config, quiet

        from gradreg_optim import ZeroGradRegOptimizer

        config = {**make_config(int(engine[-1]), micro_batches=2), "train_micro_batch_size_per_gpu": 4}
        with quiet():
            base = torch.optim.SGD(model.parameters(), lr=0.1)
            called, *_ = deepspeed.initialize(model=model, optimizer=base, config=config)
        return called, running, ZeroGradRegOptimizer(called, **settings), lambda loss: (called.backward(loss), called.step())
    if engine == "ddp":
        called = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        called = fully_shard(model)
    optimizer = GradRegOptimizer(torch.optim.SGD(called.parameters(), lr=0.1), **settings)
    return called, running, optimizer, lambda loss: (loss / 2).backward()


def data():
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    return torch.randn(2, 4, 5, generator=generator)


def moves(engine, method, driver):
    """The running buffer as each pass of two steps finds and leaves it, and as the step leaves it."""
    called, running, optimizer, backward = built(engine, strength=0.1, eps=1e-3, method=method, check_every=0)
    found = []

    def closure():
        optimizer.zero_grad()
        before = running.scale.clone()
        for inputs in data():
            backward(called(inputs).square().mean())
        found[-1].append((before, running.scale.clone()))

    for _ in range(2):
        found.append([])
        if driver == "closure":
            optimizer.step(closure)
        else:
            for _ in optimizer.passes():
                closure()
            optimizer.step()
        found[-1].append((running.scale.clone(), running.mask.clone()))
    if engine.startswith("zero"):
        called.destroy()
    return found


@pytest.mark.parametrize(("method", "driver"), [("forward", "closure"), ("central", "loop")])
@pytest.mark.parametrize("engine", ENGINES)
def test_buffers_start_where_they_did_and_move_once(pair, engine, method, driver):
    """Over an accumulation window of two micro-batches on each of two ranks."""
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed", reason="DeepSpeed is an extra")
    for found in pair.run(moves, engine, method, driver):
        for *passes, (scale, mask) in found:
            assert len(passes) == (2 if method == "forward" else 3)
            assert all(torch.equal(before, passes[0][0]) for before, _ in passes)
            assert not torch.equal(*passes[0])
            assert torch.equal(scale, passes[0][1])
            assert torch.equal(mask, torch.ones(7))


def drawn(engine, on_ranks):
    """What the first step says of a loss that draws masks from a generator of its own on some ranks."""
    called, _, optimizer, backward = built(engine, strength=0.1, eps=1e-3, check_every=0)
    generator, calls = torch.Generator().manual_seed(0), []

    def closure():
        optimizer.zero_grad()
        calls.append(1)
        for inputs in data():
            mask = torch.rand(4, 5, generator=generator if dist.get_rank() in on_ranks else None) > 0.5
            backward(called(mask * inputs).square().mean())

    try:
        optimizer.step(closure)
        said = ""
    except RuntimeError as error:
        said = str(error)
    if engine.startswith("zero"):
        called.destroy()
    return said, len(calls)


@pytest.mark.parametrize("on_ranks", [(), (0, 1), (1,)], ids=["none", "both", "one"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_loss_that_draws_is_refused_on_every_rank(pair, engine, on_ranks):
    """Also by ranks whose own loss is repeatable, which would wait for the others."""
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed", reason="DeepSpeed is an extra")
    for rank, (said, calls) in enumerate(pair.run(drawn, engine, on_ranks)):
        assert calls == (3 if on_ranks else 2)
        assert said.startswith("The loss is not a function of the weights") == bool(on_ranks)
        assert ("another rank" in said) == (on_ranks == (1,) and rank == 0)
