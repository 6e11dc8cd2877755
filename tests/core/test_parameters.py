"""Ordinary inputs that are easily forgotten: frozen, unused, tied, empty, sparse parameters, gradients that come and go."""

import math

import pytest
import torch
from problems import assert_same, closure_of, leave_unread, regression, twin_of, unchecked, weights
from torch import nn

SETTINGS = {"strength": 0.25, "eps": 0.125, "g1_clip": None, "g2_clip": None}  # γ/ε = 2


def test_frozen_parameters_stay_frozen():
    """Without requires_grad a parameter is not perturbed, not copied, gets no gradient; thawed, it takes part."""
    model, loss = regression()
    model[0].requires_grad_(False)
    before = weights(model[0])
    standing = []
    optimizer = unchecked(torch.optim.SGD(model.parameters(), lr=0.1), **SETTINGS)
    closure = closure_of(optimizer, lambda: (standing.append(weights(model[0])), loss())[1])
    optimizer.step(closure)
    assert_same(standing, [before, before])
    assert_same(weights(model[0]), before)
    assert model[0].weight.grad is None
    model[0].requires_grad_(True)
    optimizer.step(closure_of(optimizer, loss))
    assert (model[0].weight != before[0]).any()


def test_a_gradient_left_on_a_frozen_parameter_is_left_there():
    """The first pass's leftover on a parameter that was frozen since is neither regularized nor lost."""
    model, loss = regression()
    model[0].requires_grad_(False)
    model[0].weight.grad = torch.full_like(model[0].weight, 3.0)
    optimizer = unchecked(torch.optim.SGD(model.parameters(), lr=0.1), **SETTINGS)

    def closure():
        model[2].zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    assert_same(model[0].weight.grad, torch.full_like(model[0].weight, 3.0))


def test_unused_parameters_keep_no_gradient():
    """A parameter that no pass reaches has ``None`` afterwards: momentum and weight decay leave it alone."""
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = unchecked(torch.optim.AdamW([used, unused], lr=0.1, weight_decay=0.5), **SETTINGS)
    optimizer.step(closure_of(optimizer, lambda: used.square().sum()))
    assert unused.grad is None
    assert_same(unused.detach(), torch.ones(2))


def test_tied_parameters_are_perturbed_once():
    """A weight under two names moves once, and its two uses sum into one gradient."""
    layer, other = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    other.weight = layer.weight
    model = nn.Sequential(layer, nn.Tanh(), other)
    start = layer.weight.detach().clone()
    inputs = torch.randn(5, 3)
    standing = []
    optimizer = unchecked(torch.optim.SGD(model.parameters(), lr=0.1), **SETTINGS)
    closure = closure_of(optimizer, lambda: (standing.append(weights(layer)[0]), model(inputs).square().mean())[1])
    optimizer.step(closure)
    assert len(closure.gradients[0]) == 1
    assert_same(standing[1], torch.add(start, closure.gradients[0][0], alpha=0.125))


def test_a_gradient_in_the_first_pass_only():
    """g2 is 0 there: the combined gradient is g1 + 2·(0 − g1); and the weight is restored all the same."""
    w, v = nn.Parameter(torch.tensor([1.0, 3.0])), nn.Parameter(torch.tensor([2.0]))
    calls = iter([True, False])
    standing = []

    def loss():
        standing.append(v.detach().clone())
        return w.square().sum() + (v.square().sum() if next(calls) else 0.0)

    optimizer = unchecked(torch.optim.SGD([w, v], lr=0.0), **SETTINGS)
    optimizer._losses.is_integral = False  # the two losses differ on purpose
    optimizer.step(closure_of(optimizer, loss))
    assert_same(standing, [torch.tensor([2.0]), torch.tensor([2.5])])
    assert_same(v.detach(), torch.tensor([2.0]))
    assert_same(v.grad, torch.tensor([-4.0]))


def test_a_gradient_in_the_second_pass_only():
    """g1 is 0 there: the parameter does not move before the second pass, and its gradient is 2·(g2 − 0)."""
    w, v = nn.Parameter(torch.tensor([1.0, 3.0])), nn.Parameter(torch.tensor([2.0]))
    calls = iter([False, True])
    optimizer = unchecked(torch.optim.SGD([w, v], lr=0.0), **SETTINGS)
    optimizer._losses.is_integral = False  # the two losses differ on purpose
    optimizer.step(closure_of(optimizer, lambda: w.square().sum() + (v.square().sum() if next(calls) else 0.0)))
    assert_same(v.grad, torch.tensor([8.0]))
    # ‖g2‖: w moves to (1.25, 3.75), whose gradient is (2.5, 7.5); v's is 4.
    # float32
    assert float(optimizer.metrics["g2_norm"]) == pytest.approx(math.sqrt(2.5**2 + 7.5**2 + 4.0**2), rel=1e-6)


def test_excluded_parameters_with_a_gradient_in_one_pass_only():
    """They end the step with what the first pass left, be it nothing."""
    w, v, u = (nn.Parameter(torch.ones(1)) for _ in range(3))
    calls = iter([v, u])
    optimizer = unchecked(torch.optim.SGD([("w", w), ("out.v", v), ("out.u", u)], lr=0.0), exclude="out", **SETTINGS)
    optimizer.step(closure_of(optimizer, lambda: (w * next(calls)).square().sum()))
    assert_same(v.grad, torch.tensor([2.0]))
    assert u.grad is None


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,)])
def test_scalars_and_empty_tensors(shape):
    """Parameters without dimensions or without elements pass through every phase."""
    w, odd = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(shape))
    for settings in (SETTINGS, {"radius": 0.1, "max_penalty_ratio": 0.1}):
        optimizer = unchecked(torch.optim.AdamW([w, odd], lr=0.1), **settings)
        optimizer.step(closure_of(optimizer, lambda: w.square().sum() + odd.square().sum()))
        assert odd.grad.shape == shape


@pytest.mark.parametrize("layout", ["channels last", "transposed"])
def test_strides_of_any_kind(layout):
    """Parameters that are not contiguous take the step of their contiguous copies."""
    start = torch.randn(2, 3, 4, 5)
    odd = start.to(memory_format=torch.channels_last) if layout == "channels last" else start.transpose(1, 3)
    parameters = nn.Parameter(odd.clone(memory_format=torch.preserve_format)), nn.Parameter(odd.contiguous())
    assert not parameters[0].is_contiguous()
    for parameter in parameters:
        optimizer = unchecked(torch.optim.SGD([parameter], lr=0.1), **SETTINGS)
        for _ in range(2):
            optimizer.step(closure_of(optimizer, lambda parameter=parameter: (parameter * parameter * parameter).sum()))
    assert_same(parameters[0].detach().contiguous(), parameters[1].detach())


def test_mixed_precisions_in_one_group():
    """float64, float32 and bfloat16 parameters side by side: each gradient keeps its dtype, and γ = ε leaves g2."""
    parameters = [nn.Parameter(torch.randn(3).to(dtype)) for dtype in (torch.bfloat16, torch.float32, torch.float64)]
    optimizer = unchecked(torch.optim.SGD(parameters, lr=0.1), strength=0.5, eps=0.5, check_every=0)
    closure = closure_of(optimizer, lambda: sum(parameter.double().pow(4).sum() for parameter in parameters) / 100)
    optimizer.step(closure)
    assert_same([parameter.grad for parameter in parameters], closure.gradients[1])
    expected = math.sqrt(sum(g.double().square().sum().item() for g in closure.gradients[0]))
    # float32 sums the narrower ones.
    assert float(optimizer.metrics["g1_norm"]) == pytest.approx(expected, rel=1e-7)


def embedding(sparse):
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3, sparse=sparse), "head": nn.Linear(3, 1)})
    tokens = torch.tensor([0, 1, 1, 4])
    return model, lambda: model["head"](model["embed"](tokens).tanh()).square().mean()


def test_sparse_gradients_are_refused_and_nothing_has_changed():
    """The error comes before any weight moves, and every gradient of the first pass is where it was."""
    model, loss = embedding(sparse=True)
    before = weights(model)
    optimizer = unchecked(torch.optim.SGD(reversed(list(model.parameters())), lr=0.1), **SETTINGS)
    closure = closure_of(optimizer, loss)
    with pytest.raises(ValueError, match="sparse"):
        optimizer.step(closure)
    assert closure.calls == 1
    assert_same(weights(model), before)
    gradients = [parameter.grad for parameter in reversed(list(model.parameters()))]
    assert_same([g.to_dense() for g in gradients], [g.to_dense() for g in closure.gradients[0]])


def test_sparse_gradients_of_excluded_parameters_are_fine():
    """An excluded sparse embedding takes its own g1, as a dense one does."""
    results = []
    for sparse in (True, False):
        model, loss = embedding(sparse)
        optimizer = unchecked(torch.optim.SGD(model.named_parameters(), lr=0.1), exclude="embed", **SETTINGS)
        optimizer.step(closure_of(optimizer, loss))
        assert model["embed"].weight.grad.is_sparse == sparse
        results.append(weights(model))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)  # repeated rows are summed in another order


def test_sparse_adam_is_wrapped_if_all_is_excluded_and_refused_otherwise():
    """SparseAdam wants sparse gradients, which are not regularized: of strength 0 it is itself."""
    model, loss = embedding(sparse=True)
    optimizer = unchecked(torch.optim.SparseAdam([model["embed"].weight]), strength=0.0)
    optimizer.step(closure_of(optimizer, loss))
    optimizer = unchecked(torch.optim.SparseAdam([model["embed"].weight]))
    with pytest.raises(ValueError, match=r"layout torch\.sparse_coo"):
        optimizer.step(closure_of(optimizer, loss))


@pytest.mark.parametrize("settings", [{"eps": 0.1}, {"radius": 0.1}, {"radius": 0.1, "max_penalty_ratio": 0.5}])
@pytest.mark.parametrize("read", [True, False], ids=["read", "unread"])
def test_a_zero_gradient_has_no_direction(settings, read, monkeypatch):
    """At a stationary point nothing moves and no figure is NaN, also where ε = ρ/0, and where nobody has read that."""
    if not read:
        leave_unread(monkeypatch)
    w = nn.Parameter(torch.zeros(3))
    optimizer = unchecked(torch.optim.SGD([w], lr=0.1), **settings)
    optimizer.step(closure_of(optimizer, lambda: w.square().sum()))
    assert_same(w.detach(), torch.zeros(3))
    assert_same(w.grad, torch.zeros(3))
    assert all(math.isfinite(value) for value in optimizer.metrics.values())
    assert optimizer.metrics["skipped"] == 0


def test_no_gradient_at_all():
    """A batch that reaches no parameter leaves the step to the base optimizer, after one pass; one warning says so."""
    w = nn.Parameter(torch.ones(3))
    optimizer = unchecked(torch.optim.SGD([w], lr=0.1), strength=0.1)
    calls = []
    with pytest.warns(UserWarning, match=r"left no gradient .* 1 parameters 1 require a gradient and 0 have one.*backward"):
        optimizer.step(lambda: calls.append(1))
    optimizer.step(lambda: calls.append(2))  # batches may be skipped: it is said once
    assert calls == [1, 2]
    assert_same(w.detach(), torch.ones(3))
    assert optimizer.step_count == 2
    assert optimizer.metrics == {"strength": 0.1, "skipped": 0}


@pytest.mark.parametrize("by", ["exclude", "strength"])
def test_only_parameters_that_are_left_out_have_a_gradient(by):
    """A phase in which all that is regularized is frozen: the step is the base optimizer's, and a warning says so."""
    model, loss = regression()
    model[0].requires_grad_(False)
    other, other_loss = twin_of(model, loss)
    own = {"gradreg_strength": 0.0} if by == "strength" else {}
    groups = [
        {"params": list(model[0].named_parameters(prefix="0"))},
        {"params": list(model[2].named_parameters(prefix="2")), **own},
    ]
    optimizer = unchecked(torch.optim.SGD(groups, lr=0.1), exclude="2." if by == "exclude" else ())
    bare = torch.optim.SGD(other.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="4 parameters 2 require a gradient and 2 have one, which exclude="):
        optimizer.step(closure_of(optimizer, loss))
    bare.step(closure_of(bare, other_loss))
    assert_same(weights(model), weights(other))
    model[0].requires_grad_(True)
    optimizer.step(closure_of(optimizer, loss))
    assert optimizer.metrics["penalty_ratio"] > 0


def test_gradients_that_share_a_buffer_are_kept():
    """``.grad`` as a view into one buffer that the next backward fills again: g1 survives the second pass."""
    model, loss = regression()
    other, other_loss = twin_of(model, loss)
    parameters = list(model.parameters())
    buffer = torch.zeros(sum(parameter.numel() for parameter in parameters), dtype=torch.float64)
    optimizer = unchecked(torch.optim.SGD(parameters, lr=0.1), **SETTINGS)
    expected = unchecked(torch.optim.SGD(other.parameters(), lr=0.1), **SETTINGS)

    def closure():
        buffer.zero_()
        offset = 0
        for parameter in parameters:
            parameter.grad = buffer[offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel()
        value = loss()
        value.backward()
        return value

    for _ in range(2):
        optimizer.step(closure)
        expected.step(closure_of(expected, other_loss))
        assert_same(weights(model), weights(other))
