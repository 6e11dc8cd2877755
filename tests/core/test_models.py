"""Models that others have wrapped: torch.compile and DistributedDataParallel, in one process."""

import copy

import pytest
import torch
from problems import assert_same, closure_of, regression, twin_of, unchecked, weights
from torch import distributed, nn


def in_place(model):
    model.compile(backend="eager")
    return model


WAYS = {
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "torch.compile, aot": lambda model: torch.compile(model, backend="aot_eager"),
    "Module.compile": in_place,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("known", [True, False], ids=["model given", "model found"])
def test_a_compiled_model_takes_the_same_steps(way, known):
    """Compiled or not: the same steps with exclusion, BatchNorm statistics that move once, and dropout masks used twice."""
    model, loss = regression(nn.BatchNorm1d(6), nn.Dropout(0.0))
    other, other_loss = twin_of(model, loss)
    compiled = way(model)
    names = {"model": compiled if known else None}
    for current, its_loss, extra in ((model, lambda: loss(compiled), names), (other, other_loss, {})):
        parameters = current.named_parameters() if not extra.get("model") else current.parameters()
        optimizer = unchecked(torch.optim.SGD(parameters, lr=0.1), strength=0.1, eps=0.1, exclude="0.", **extra)
        for _ in range(2):
            closure = closure_of(optimizer, its_loss)
            optimizer.step(closure)
            assert closure.calls == 2
        excluded = optimizer.param_groups[0]["gradreg_excluded"]
        assert excluded == [0, 1]
    # aot_eager decomposes BatchNorm's backward into other operations.
    torch.testing.assert_close(weights(model), weights(other), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(list(model.buffers()), list(other.buffers()), rtol=1e-12, atol=1e-14)
    assert model[2].num_batches_tracked == 2


def test_a_compiled_loss_function():
    """A compiled function calls no module hooks, and finding BatchNorm layers by them would fail: ``model=`` does not."""
    model, loss = regression(nn.BatchNorm1d(6))
    compiled = torch.compile(loss, backend="eager")
    optimizer = unchecked(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    for step in range(3):
        optimizer.step(closure_of(optimizer, compiled))
        assert model[2].num_batches_tracked == step + 1


def test_compiling_does_not_change_which_names_match():
    """Names of a compiled model begin with ``_orig_mod.``: substrings match as before."""
    model, _ = regression()
    compiled = torch.compile(model, backend="eager")
    assert next(iter(dict(compiled.named_parameters()))).startswith("_orig_mod.")
    optimizer = unchecked(torch.optim.SGD(compiled.named_parameters(), lr=0.1), exclude="2.weight")
    assert optimizer.param_groups[0]["gradreg_excluded"] == [2]


@pytest.fixture
def one_process_group(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("as_view", [True, False])
def test_distributed_data_parallel(one_process_group, as_view):
    """With gradients that are views into DDP's buckets g1 survives the second pass; exclusion sees through the prefix."""
    model, loss = regression()
    other, other_loss = twin_of(model, loss)
    wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=as_view)
    for current, its_model, its_loss in (
        (wrapped, wrapped, lambda: loss(wrapped)),
        (other, other, other_loss),
    ):
        optimizer = unchecked(
            torch.optim.SGD(current.parameters(), lr=0.1),
            strength=0.1,
            eps=0.1,
            exclude="2.bias",
            model=its_model,
        )
        assert optimizer.param_groups[0]["gradreg_excluded"] == [3]
        for _ in range(3):
            optimizer.step(closure_of(optimizer, its_loss))
    assert_same(weights(model), weights(other))


def test_accumulation_without_synchronisation(one_process_group):
    """Micro-batches under no_sync, the last one outside, in both passes: the step of the whole batch."""
    model = nn.Linear(3, 1, dtype=torch.float64)
    other = copy.deepcopy(model)
    wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    batches = torch.randn(3, 4, 3, dtype=torch.float64)
    optimizer = unchecked(torch.optim.SGD(wrapped.parameters(), lr=0.1), strength=0.1, eps=0.1)

    def closure():
        optimizer.zero_grad()
        with wrapped.no_sync():
            for batch in batches[:-1]:
                (wrapped(batch).cosh().log().mean() / 3).backward()
        (wrapped(batches[-1]).cosh().log().mean() / 3).backward()

    expected = unchecked(torch.optim.SGD(other.parameters(), lr=0.1), strength=0.1, eps=0.1)
    for _ in range(2):
        optimizer.step(closure)
        expected.step(closure_of(expected, lambda: other(batches.flatten(0, 1)).cosh().log().mean()))
    torch.testing.assert_close(weights(model), weights(other), rtol=1e-12, atol=1e-13)  # order of summation
