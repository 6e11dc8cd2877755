"""The norm of micro-batches over ranks: each rank's own under DistributedDataParallel, elsewhere that of all ranks."""

import copy

import pytest
import torch
import torch.distributed as dist
from reference import combined, gradient_of
from test_sharded import data, network, rank_slice
from torch import nn
from zero_worker import computes_fp16, make_config, quiet

from gradreg_optim import GradRegOptimizer
from gradreg_optim.core.strength import STEPS

SETTINGS = {"strength": 0.3, "eps": 0.05, "g1_clip": None, "g2_clip": None, "check_every": 0}
COUNT = 3


class Sometimes(nn.Module):
    """A layer that the first rank alone runs, and one that none does."""

    def __init__(self):
        super().__init__()
        self.network, self.never = network(), nn.Linear(2, 2).double()
        torch.manual_seed(2)
        self.sometimes = nn.Linear(1, 1).double()

    def forward(self, x):
        y = self.network(x)
        return self.sometimes(y) if dist.get_rank() == 0 else y


def parts(inputs, targets):
    return [*zip(inputs.chunk(COUNT), targets.chunk(COUNT), strict=True)]


def accumulate(model, optimizer, inputs, targets, around=lambda number: None):
    for number, (x, y) in enumerate(parts(inputs, targets)):
        around(number)
        for _ in optimizer.passes(micro_batches=COUNT):
            optimizer.zero_grad()
            ((model(x).squeeze(1) - y).square().mean() / COUNT).backward()


def gradients(model):
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def ddp_case(kwargs, kind=network, by_closure=False, by_hand=False):
    """The combined gradient, what the reducer sent in it and in a plain step, and how often ranks met otherwise."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(kind(), **kwargs)
    sent, met = [], []

    def hook(group, bucket):
        sent.append(bucket.buffer().nbytes)
        return allreduce_hook(group, bucket)

    model.register_comm_hook(None, hook)
    all_reduce = dist.all_reduce
    inputs, targets = map(rank_slice, data())
    optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), norm_of="micro_batch", **SETTINGS)
    found = []
    for _ in range(3):  # the first step looks at engines, and buckets are rebuilt after it
        sent.clear()
        if by_closure:
            optimizer.step(
                lambda: (optimizer.zero_grad(), (model(inputs).squeeze(1) - targets).square().mean().backward())[1]
            )
        else:
            # With no_sync() for all but the last micro-batch, as loops have it, or without.
            around = lambda number: by_hand and setattr(model, "require_backward_grad_sync", number == COUNT - 1)  # noqa: E731
            accumulate(model, optimizer, inputs, targets, around)
            assert abs(float(optimizer.metrics["loss_check"]) - 1) < 0.01
            optimizer.step()
        found.append(gradients(model))
    regularized = sum(sent)
    sent.clear()
    optimizer.zero_grad()
    (model(inputs).squeeze(1) - targets).square().mean().backward()
    dist.all_reduce = lambda tensor, *args, **more: (met.append(tensor.numel()), all_reduce(tensor, *args, **more))[1]
    try:
        accumulate(model, optimizer, inputs, targets)
    finally:
        dist.all_reduce = all_reduce
    return found, (regularized, sum(sent) - regularized), met


def own_norms(model, count):
    """The mean over ranks and micro-batches of the combined gradients, by hand."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = []
    for rank in range(2):
        inputs, targets = (tensor.chunk(2)[rank] for tensor in data())
        for x, y in zip(inputs.chunk(count), targets.chunk(count), strict=True):
            loss = lambda x=x, y=y: (model(x).squeeze(1) - y).square().mean()  # noqa: E731
            settings = {name: value for name, value in SETTINGS.items() if name != "check_every"}
            found.append(combined(gradient_of(parameters, loss), **settings))
    return [sum(tensors) / len(found) for tensors in zip(*found, strict=True)]


@pytest.mark.parametrize("by_hand", [False, True], ids=["", "no_sync"])
@pytest.mark.parametrize("kwargs", [{}, {"gradient_as_bucket_view": True}, {"find_unused_parameters": True}], ids=str)
def test_ddp_takes_the_norm_of_a_rank(pair, kwargs, by_hand):
    """And sends what a plain step sends, once, through the model's own hook; nothing else in full precision."""
    expected = own_norms(network(), COUNT)
    for found, (regularized, plain), met in pair.run(ddp_case, kwargs, by_hand=by_hand):
        for step in found:
            torch.testing.assert_close(step, expected, rtol=1e-10, atol=1e-13)
        assert regularized == plain > 0
        met.remove(sum(map(torch.numel, expected)))  # by the hook
        assert met == ([len(expected)] if kwargs.get("find_unused_parameters") else [])


def test_ddp_by_closure(pair):
    """norm_of="micro_batch" makes the whole batch of a rank one micro-batch."""
    expected = own_norms(network(), 1)
    for found, (regularized, plain), _ in pair.run(ddp_case, {}, by_closure=True):
        torch.testing.assert_close(found[-1], expected, rtol=1e-10, atol=1e-13)
        assert regularized == plain


def test_parameters_that_few_ranks_reach(pair):
    """One that a single rank reaches gets its half; one that none reaches keeps no gradient, on all ranks."""
    answers = pair.run(ddp_case, {"find_unused_parameters": True}, Sometimes)
    (first, *_), (second, *_) = answers
    for ours, theirs in zip(first[-1], second[-1], strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert sum(gradient is None for gradient in first[-1]) == 2


def batch_norm():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.SyncBatchNorm(7), nn.Tanh(), nn.Linear(7, 1)).double()


def settling_case():
    """γ after each step, with gradients of each rank's own, one of which is not finite on one rank."""
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(network())
    optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.01))
    inputs, targets = map(rank_slice, data())
    found = []
    for step in range(STEPS + 1):
        scale = float("inf") if step == 3 and dist.get_rank() == 1 else 1.0
        for number, (x, y) in enumerate(parts(inputs, targets)):
            model.require_backward_grad_sync = number == COUNT - 1
            for _ in optimizer.passes(micro_batches=COUNT):
                optimizer.zero_grad()
                loss = (model(x).squeeze(1) - y).square().mean() / COUNT
                (loss * (scale if number == 1 else 1.0)).backward()
        if step == 3:  # the sum is not finite anywhere now
            optimizer.progress.is_complete = False
            optimizer._advance()
        else:
            optimizer.step()
        group = optimizer.param_groups[0]
        found.append([group["gradreg_strength"], group["gradreg_ratio_total"], group["gradreg_ratio_count"]])
    return found


def test_ranks_find_one_strength(pair):
    """The mean is over all ranks, in each step, also where a rank has nothing to add."""
    first, second = pair.run(settling_case)
    assert first == second
    assert isinstance(first[-1][0], float)
    assert first[-1][2] == 2 * COUNT * STEPS - 1


def found_case(settings):
    """What each rank has found after two steps in bf16, from gradients of its own."""
    import warnings

    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(network().bfloat16())
    optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), strength=0.1, **settings)
    inputs, targets = (rank_slice(tensor).bfloat16() for tensor in data())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the self-check of a network this small
        for _ in range(2):
            accumulate(model, optimizer, inputs, targets)
            optimizer.step()
    group = optimizer.param_groups[0]
    return [float(group[f"gradreg_{name}"]) for name in ("is_low", "floor", "auto_radius")]


def test_ranks_agree_on_what_they_find(pair):
    """Precision, noise floor and radius are the means over ranks, which checkpoints then hold."""
    first, second = pair.run(found_case, {})
    assert first == second
    assert first[0] == 1


def all_ranks_case(kind):
    """The combined gradient where gradients arrive reduced."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    inputs, targets = map(rank_slice, data())
    model = network()
    if kind == "fsdp2":
        fully_shard(model[0])
        fully_shard(model)
    elif kind == "static graph":
        model = DistributedDataParallel(model, static_graph=True)
    optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), **SETTINGS)
    found = []

    def around(number):
        if kind == "fsdp2":  # as loops do that accumulate; it does not count here
            model.set_requires_gradient_sync(number == COUNT - 1)
        elif number:  # a static graph needs its first reduction
            model.require_backward_grad_sync = number == COUNT - 1

    for _ in range(2):
        accumulate(model, optimizer, inputs, targets, around)
        found.append([(g.full_tensor() if kind == "fsdp2" else g).clone() for g in gradients(model)])
        optimizer.step()
    return found


@pytest.mark.parametrize("kind", ["fsdp2", "static graph"])
def test_elsewhere_the_micro_batch_is_that_of_all_ranks(pair, kind):
    """FSDP2 reduces in each pass, and so does a static graph, whose first iteration is recorded."""
    model, (inputs, targets) = network(), data()
    batches = [tensor.chunk(2) for tensor in (inputs, targets)]
    found = []
    for number in range(COUNT):
        x, y = (torch.cat([half.chunk(COUNT)[number] for half in halves]) for halves in batches)
        loss = lambda x=x, y=y: (model(x).squeeze(1) - y).square().mean()  # noqa: E731
        settings = {name: value for name, value in SETTINGS.items() if name != "check_every"}
        found.append(combined(gradient_of(list(model.parameters()), loss), **settings))
    expected = [sum(tensors) / COUNT for tensors in zip(*found, strict=True)]
    for steps in pair.run(all_ranks_case, kind):
        for step in steps:
            torch.testing.assert_close(step, expected, rtol=1e-10, atol=1e-13)


def zero_case(stage, precision, accumulation):
    """The weights after two steps, and those computed by hand; the engine's counters."""
    import deepspeed

    from gradreg_optim import ZeroGradRegOptimizer

    model = network().float()
    by_hand = copy.deepcopy(model)
    more = {"zero": {"offload_optimizer": {"device": "cpu"}}} if precision == "offload" else {}
    config = make_config(stage, micro_batches=accumulation, precision=precision.replace("offload", "fp32"), **more)
    is_supported = computes_fp16()
    deepspeed.get_accelerator().is_fp16_supported = lambda: is_supported
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with quiet():
        engine = deepspeed.initialize(model=model, optimizer=base, config=config)[0]
    settings = {name: value for name, value in SETTINGS.items() if name != "check_every"}
    optimizer = ZeroGradRegOptimizer(engine, check_every=0, **settings)
    inputs, targets = (tensor.float() for tensor in data())
    parameters = list(by_hand.parameters())
    for _ in range(2):
        found = []
        for number in range(COUNT):
            x, y = (torch.cat([half.chunk(COUNT)[number] for half in tensor.chunk(2)]) for tensor in (inputs, targets))
            found.append(
                combined(gradient_of(parameters, lambda x=x, y=y: (by_hand(x).squeeze(1) - y).square().mean()), **settings)
            )
        with torch.no_grad():
            for parameter, *gradient in zip(parameters, *found, strict=True):
                parameter -= 0.1 * sum(gradient) / COUNT
        for x, y in parts(rank_slice(inputs), rank_slice(targets)):
            for _ in optimizer.passes(micro_batches=COUNT):
                loss = (engine(x.to(dtype)).squeeze(1).float() - y).square().mean()
                engine.backward(loss if accumulation == COUNT else loss / COUNT)
                engine.step()
        optimizer.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters())) if stage == 3 else torch.no_grad():
        weights = [parameter.detach().float().clone() for parameter in model.parameters()]
    metrics = {name: float(value) for name, value in optimizer.metrics.items()}
    return weights, [p.detach() for p in parameters], (engine.global_steps, engine.micro_steps), metrics


EXACT = [*((stage, "fp32", COUNT) for stage in range(4)), (1, "fp32", 1), (2, "fp32", 1)]
OFFLOADED = [(stage, "offload", COUNT) for stage in (2, 3)]
HALF = [(stage, precision, COUNT) for stage in (1, 2, 3) for precision in ("bf16", "fp16")]
ZERO = [*EXACT, *OFFLOADED, *HALF]


@pytest.mark.parametrize(("stage", "precision", "accumulation"), ZERO)
def test_zero(pair, stage, precision, accumulation):
    """The micro-batch of all ranks; the engine counts each of them, and one step."""
    pytest.importorskip("deepspeed")
    is_exact = precision in ("fp32", "offload")
    for weights, expected, counters, metrics in pair.run(zero_case, stage, precision, accumulation):
        for got, wanted in zip(weights, expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6 if is_exact else 2e-2)
        if precision != "fp16":  # whose first steps overflow
            assert counters == (2, 2 * COUNT)
        assert abs(metrics["loss_check"] - 1) < (1e-2 if is_exact else 0.5)
