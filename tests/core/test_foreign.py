"""Gradients that something else uses or refills: the step says so, and does not take harmless hooks for it."""

import warnings

import pytest
import torch
from problems import assert_same, closure_of, regression, unchecked, weights
from torch import nn

SETTINGS = {"strength": 0.1, "eps": 0.1}


def wrapped(model, **settings):
    return unchecked(torch.optim.SGD(model.parameters(), lr=0.1), **{**SETTINGS, **settings})


def stepping(parameters, clear):
    """Hooks that step an optimizer for each parameter in the backward, and clear its gradient as ``clear`` says."""
    for parameter in parameters:
        inner = torch.optim.SGD([parameter], lr=0.1)

        def hook(_parameter, inner=inner):
            inner.step()
            if clear is not None:
                inner.zero_grad(set_to_none=clear)

        parameter.register_post_accumulate_grad_hook(hook)


def released(parameters, _clear):
    """Hooks that take the gradient away and move the weights where no version counts, as kernels of one's own do."""
    for parameter in parameters:

        def hook(parameter):
            parameter.data.sub_(parameter.grad, alpha=0.1)
            parameter.grad = None

        parameter.register_post_accumulate_grad_hook(hook)


def fused(parameters, _clear):
    """LOMO's way: a hook on one gradient steps the parameters whose gradients are complete; the last one after backward."""
    parameters = list(parameters)

    def update(gradient):
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.data.sub_(parameter.grad, alpha=0.1)
                parameter.grad = None
        return gradient

    for parameter in parameters:
        parameter.register_hook(update)
    return update


def by_torch(parameters, _clear):
    """torch's own optimizer in the backward, whose hooks are on the nodes of the graph."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch imports parts of torch.jit, which it has deprecated
        from torch.distributed.optim import _apply_optimizer_in_backward
    _apply_optimizer_in_backward(torch.optim.SGD, parameters, {"lr": 0.1})


def drive(optimizer, closure, how):
    if how == "closure":
        optimizer.step(closure)
    else:
        for _ in optimizer.passes():
            closure()
        optimizer.step()


@pytest.mark.parametrize("how", ["closure", "loop"])
@pytest.mark.parametrize("taken", ["all", "one"])
@pytest.mark.parametrize("clear", [True, False, None], ids=["cleared", "zeroed", "left"])
def test_an_optimizer_that_steps_in_the_backward_is_refused(clear, taken, how):
    """Of all parameters or of one, whatever its hooks leave in ``.grad``: before a second pass."""
    model, loss = regression()
    optimizer = wrapped(model)
    stepping(list(model.parameters())[: 1 if taken == "one" else None], clear)
    closure = closure_of(optimizer, loss)
    closure.loss = loss
    with pytest.raises(RuntimeError, match="first backward has used up its gradients"):
        drive(optimizer, closure, how)
    assert closure.calls <= 1
    assert optimizer.step_count == 0


@pytest.mark.parametrize("install", [released, by_torch], ids=["no version", "torch"])
def test_gradients_that_the_backward_took_away_are_missed(install):
    """By hooks that leave no gradient at all, whether the weights count their versions or the hooks can be seen."""
    model, loss = regression()
    optimizer = wrapped(model)
    install(model.parameters(), True)
    with pytest.raises(RuntimeError, match="first backward has used up its gradients"):
        optimizer.step(closure_of(optimizer, loss))


def test_a_fused_backward_is_refused():
    """LOMO's hooks on gradients, and the update of the last parameter after the backward."""
    model, loss = regression()
    optimizer = wrapped(model)
    update = fused(model.parameters(), True)

    def closure():
        loss().backward()
        update(None)

    with pytest.raises(RuntimeError, match="first backward has used up its gradients"):
        optimizer.step(closure)


def test_hooks_that_step_nothing_are_welcome():
    """Hooks that count, log or mask gradients change nothing but what they change in both gradients."""
    model, loss = regression()
    optimizer = wrapped(model)
    seen = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.norm()))
    model[0].weight.register_hook(lambda gradient: gradient * 0.5)
    closure = closure_of(optimizer, loss)
    optimizer.step(closure)
    assert closure.calls == 2
    assert len(seen) == 8
    g1, g2 = closure.gradients
    assert_same([p.grad for p in model.parameters()], g2)  # γ = ε
    assert any((a != b).any() for a, b in zip(g1, g2, strict=True))


def test_weights_that_the_forward_writes_are_welcome():
    """An embedding with ``max_norm`` renormalizes its rows in the forward; a codebook that has no gradient moves there."""
    torch.manual_seed(1)
    embedding, layer = nn.Embedding(5, 3, max_norm=0.5), nn.Linear(3, 1)
    codebook = nn.Parameter(torch.ones(2))
    optimizer = unchecked(torch.optim.SGD([*embedding.parameters(), *layer.parameters(), codebook], lr=0.1), **SETTINGS)
    embedding.weight.register_hook(lambda gradient: gradient * 0.5)  # a mask, as for new tokens

    def loss():
        with torch.no_grad():
            codebook.mul_(0.5)
        return layer(embedding(torch.tensor([0, 1, 4]))).square().sum()

    closure = closure_of(optimizer, loss)
    optimizer.step(closure)
    assert closure.calls == 3  # g1 is taken again at the weights that the first pass wrote
    assert optimizer.metrics["penalty_ratio"] > 0


def test_without_penalty_hooks_may_do_what_they_like():
    """A step without penalty is the wrapped optimizer's: nothing is refused."""
    model, loss = regression()
    optimizer = wrapped(model, strength=0.0)
    stepping(model.parameters(), True)
    before = weights(model)
    optimizer.step(closure_of(optimizer, loss))
    assert any((a != b).any() for a, b in zip(weights(model), before, strict=True))


class Static:
    """A quadratic whose gradient lies at a fixed address, refilled in every pass."""

    def __init__(self):
        self.weight = nn.Parameter(torch.tensor([1.0, 1.0]))
        self.curvature = torch.tensor([1.0, 4.0])
        self.gradient = torch.zeros(2)

    def refill(self):
        self.gradient.copy_(self.curvature * self.weight.detach())

    def right(self, strength):
        return 1 - 0.1 * (self.curvature + strength * self.curvature**2)


@pytest.mark.parametrize("method", ["forward", "central"])
@pytest.mark.parametrize("write", ["copy_", "data", "numpy"])
def test_gradients_that_are_refilled_in_place_are_noticed(write, method):
    """The same tensor put back with other values, seen by its version or, where that does not count, by its address."""
    problem = Static()
    optimizer = unchecked(torch.optim.SGD([problem.weight], lr=0.1), strength=0.5, eps=1e-2, method=method)

    def closure():
        values = problem.curvature * problem.weight.detach()
        if write == "copy_":
            problem.gradient.copy_(values)
        elif write == "data":
            problem.gradient.data.copy_(values)
        else:
            problem.gradient.numpy()[:] = values.numpy()
        problem.weight.grad = problem.gradient

    with pytest.raises(RuntimeError, match="into the memory of those of the first pass"):
        optimizer.step(closure)
    assert_same(problem.weight.detach(), torch.ones(2))


def test_gradients_that_are_kept_and_zeroed_are_noticed():
    """A list of gradients that the closure clears by itself holds g1 too."""
    model, loss = regression()
    optimizer = wrapped(model)
    kept = []

    def closure():
        torch._foreach_zero_(kept) if kept else None
        loss().backward()
        kept.extend(p.grad for p in model.parameters())

    with pytest.raises(RuntimeError, match="into the memory of those of the first pass"):
        optimizer.step(closure)


def test_excluded_gradients_are_noticed_too():
    """A parameter that is left out gets g1 back, which has to be there."""
    problem = Static()
    layer = nn.Linear(2, 1, bias=False)
    optimizer = unchecked(torch.optim.SGD([("layer", layer.weight), ("static", problem.weight)], lr=0.1), exclude="static")

    def closure():
        layer.weight.grad = None
        layer(problem.weight.detach()).square().sum().backward()
        problem.refill()
        problem.weight.grad = problem.gradient

    with pytest.raises(RuntimeError, match="into the memory of those of the first pass"):
        optimizer.step(closure)


@pytest.mark.parametrize("layout", ["own", "view"])
def test_gradients_of_their_own_are_right(layout):
    """A copy in every pass, or views into a larger buffer, of which g1 is copied: the closed form."""
    problem = Static()
    flat = torch.zeros(4)
    optimizer = unchecked(torch.optim.SGD([problem.weight], lr=0.1), strength=0.5, eps=1e-2, g1_clip=None, g2_clip=None)

    def closure():
        problem.refill()
        if layout == "own":
            problem.weight.grad = problem.gradient.clone()
        else:
            flat[:2] = problem.gradient
            problem.weight.grad = flat[:2]

    optimizer.step(closure)
    # float32, divided by ε.
    torch.testing.assert_close(problem.weight.detach(), problem.right(0.5), rtol=1e-4, atol=1e-5)


def test_weights_without_data():
    """A model on the meta device runs, and has nothing that could be moved."""
    with torch.device("meta"):
        model = nn.Linear(3, 1)
    optimizer = wrapped(model)
    with pytest.raises(RuntimeError, match="on the meta device"):
        optimizer.step(closure_of(optimizer, lambda: model(torch.ones(2, 3, device="meta")).sum()))
