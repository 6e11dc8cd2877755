"""The ways to estimate H·d: forward, central, and exact by differentiating twice."""

import copy
import math
import types

import pytest
import torch
from problems import assert_same, closure_of, regression, weights
from torch import nn

from gradreg_optim import GradRegOptimizer

STRENGTH = 0.3


def gradient_and_product(parameters, loss, clip=None):
    """∇L, clipped, and H times it, by double backward."""
    g1 = torch.autograd.grad(loss(), parameters, create_graph=True)
    norm = torch.cat([g.flatten() for g in g1]).norm().item()
    factor = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))
    d = [factor * g.detach() for g in g1]
    product = torch.autograd.grad(sum((g * x).sum() for g, x in zip(g1, d, strict=True)), parameters)
    return d, list(product)


def combined(parameters):
    return [parameter.grad.clone() for parameter in parameters]


def stepped(model, loss, closure=None, **settings):
    optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), strength=STRENGTH, **settings)
    closure = closure or closure_of(optimizer, loss)
    optimizer.step(closure)
    return optimizer, closure


@pytest.mark.parametrize("clip", [None, 0.05])
def test_exact_is_the_second_derivative(clip):
    """g1 + γ·H·g1, to the last digits, and not a difference of anything."""
    model, loss = regression()
    parameters = list(model.parameters())
    d, product = gradient_and_product(parameters, loss, clip)
    optimizer, closure = stepped(model, loss, method="exact", g1_clip=clip)
    expected = [a + STRENGTH * b for a, b in zip(d, product, strict=True)]
    torch.testing.assert_close(combined(parameters), expected, rtol=1e-12, atol=1e-14)
    assert closure.calls == 2
    flat = [torch.cat([x.flatten() for x in tensors]) for tensors in (d, product)]
    assert float(optimizer.metrics["curvature"]) == pytest.approx(float(flat[0] @ flat[1] / (flat[0] @ flat[0])))
    assert float(optimizer.metrics["penalty_ratio"]) == pytest.approx(STRENGTH * float(flat[1].norm() / flat[0].norm()))
    assert not {"eps", "g2_norm", "cosine", "perturbation_fidelity"} & set(optimizer.metrics)


def test_exact_over_micro_batches():
    """Every backward of the closure adds its own product along the whole batch's gradient."""
    model, _ = regression()
    parameters = list(model.parameters())
    batches = torch.randn(3, 8, 4, dtype=torch.float64)

    def whole():
        return sum(model(batch).pow(4).mean() for batch in batches) / 3

    d, product = gradient_and_product(parameters, whole)
    optimizer = GradRegOptimizer(torch.optim.SGD(parameters, lr=0.0), strength=STRENGTH, method="exact")

    def closure():
        optimizer.zero_grad()
        for batch in batches:
            (model(batch).pow(4).mean() / 3).backward()

    optimizer.step(closure)
    expected = [a + STRENGTH * b for a, b in zip(d, product, strict=True)]
    torch.testing.assert_close(combined(parameters), expected, rtol=1e-11, atol=1e-14)


def test_exact_under_a_scaler():
    """A scaled loss gives a scaled product along the unscaled gradient."""
    model, loss = regression(dtype=torch.float32)
    parameters = list(model.parameters())
    d, product = gradient_and_product(parameters, loss)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    optimizer = GradRegOptimizer(torch.optim.SGD(parameters, lr=0.0), strength=STRENGTH, method="exact", scaler=scaler)
    optimizer.step(closure_of(optimizer, loss, scaler.scale))
    expected = [a + STRENGTH * b for a, b in zip(d, product, strict=True)]
    torch.testing.assert_close(combined(parameters), expected, rtol=1e-5, atol=1e-6)


def game(*, shared):
    """Two networks and two losses: that of each player counts for its own weights. ``shared``: one forward for both."""
    torch.manual_seed(0)
    one, two = (nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)).double() for _ in range(2))
    critic, inputs = nn.Linear(4, 1).double(), torch.randn(8, 4).double()

    def losses():
        outputs = two(one(inputs))
        return critic(outputs).square().mean(), (outputs if shared else two(one(inputs))).square().mean()

    return one, two, critic, losses


PLAYS = {
    "inputs": lambda own, other, losses: losses[0].backward(inputs=own),
    "two losses": lambda own, other, losses: [
        losses[0].backward(inputs=iter(own) if torch.__version__ >= (2, 7) else own, retain_graph=True),
        losses[1].backward(None, None, inputs=tuple(other)),
    ],
    "one input": lambda own, other, losses: [
        torch.autograd.backward(losses[0], inputs=own[0], retain_graph=True),
        torch.autograd.backward([losses[1]], [torch.ones_like(losses[1])], inputs=own[1:]),
    ],
    "summed up": lambda own, other, losses: [
        losses[0].backward(retain_graph=True),
        losses[0].backward(torch.tensor(0.5).double(), retain_graph=True),
        losses[1].backward(),
    ],
}


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("play", PLAYS.values(), ids=PLAYS)
def test_exact_obeys_the_arguments_of_backward(play, shared):
    """``inputs``, ``retain_graph``, gradients of roots: γ times the derivative of the gradients along g1, and no others."""
    one, two, critic, losses = game(shared=shared)
    own, other = list(one.parameters()), list(two.parameters())
    optimizer = GradRegOptimizer(
        torch.optim.SGD([*own, *other], lr=0.0), strength=STRENGTH, method="exact", g1_clip=None, g2_clip=None
    )

    def field():
        for parameter in (*own, *other):
            parameter.grad = None
        play(own, other, losses())
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in (*own, *other)]

    g1, start = field(), [parameter.detach().clone() for parameter in (*own, *other)]
    sides = []
    for eps in (1e-4, -1e-4):
        with torch.no_grad():
            for parameter, theta, along in zip((*own, *other), start, g1, strict=True):
                parameter.copy_(theta + eps * along)
        sides.append(field())
    with torch.no_grad():
        for parameter, theta in zip((*own, *other), start, strict=True):
            parameter.copy_(theta)
    critic.zero_grad()
    product = [(a - b) / 2e-4 for a, b in zip(*sides, strict=True)]

    def closure():
        optimizer.zero_grad()
        play(own, other, losses())

    optimizer.step(closure)
    got = [torch.zeros_like(p) if p.grad is None else p.grad for p in (*own, *other)]
    expected = [g + STRENGTH * d for g, d in zip(g1, product, strict=True)]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-8)  # the error of a central difference
    has_inputs = play is not PLAYS["summed up"]
    assert all((p.grad is None) == has_inputs for p in critic.parameters())
    if play is PLAYS["inputs"]:
        assert all(parameter.grad is None for parameter in other)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")  # this is what is tested
def test_exact_after_a_backward_with_a_graph():
    """One backward(create_graph=True) is one like any other as long as no loss is computed from ``.grad``."""
    model, loss = regression()
    _, product = gradient_and_product(list(model.parameters()), loss)
    optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), strength=STRENGTH, method="exact")

    def closure():
        optimizer.zero_grad()
        loss().backward(create_graph=True)

    optimizer.step(closure)
    g1 = torch.autograd.grad(loss(), list(model.parameters()))
    expected = [g + STRENGTH * d for g, d in zip(g1, product, strict=True)]
    torch.testing.assert_close([p.grad.detach() for p in model.parameters()], expected, rtol=1e-12, atol=1e-14)
    optimizer.zero_grad()


def test_exact_leaves_excluded_parameters_alone():
    """They get g1, and d has no part along them."""
    model, loss = regression()
    last = list(model[2].parameters())
    g1 = torch.autograd.grad(loss(), list(model.parameters()), create_graph=True)
    inner = list(model[0].parameters())
    product = torch.autograd.grad(sum((g * g.detach()).sum() for g in g1[: len(inner)]), inner)
    optimizer = GradRegOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0), strength=STRENGTH, method="exact", exclude=["2."], model=model
    )
    optimizer.step(closure_of(optimizer, loss))
    expected = [a + STRENGTH * b for a, b in zip(g1, product, strict=False)]
    torch.testing.assert_close(combined(inner), expected, rtol=1e-12, atol=1e-14)
    assert_same(combined(last), [g.detach() for g in g1[len(inner) :]])


def test_exact_sees_through_fused_attention():
    """PyTorch's fused kernel has no second derivative; the mathematical form takes its place in the second pass."""
    q = nn.Parameter(torch.randn(1, 2, 5, 4))
    fixed = torch.randn(2, 1, 2, 5, 4)

    def loss(written_out=False):
        if written_out:
            weights = torch.softmax(q @ fixed[0].transpose(-1, -2) / math.sqrt(4), -1)
            return (weights @ fixed[1]).pow(2).mean()
        return nn.functional.scaled_dot_product_attention(q, *fixed).pow(2).mean()

    (d,), (product,) = gradient_and_product([q], lambda: loss(written_out=True))
    optimizer = GradRegOptimizer(torch.optim.SGD([q], lr=0.0), strength=STRENGTH, method="exact")
    optimizer.step(closure_of(optimizer, loss))
    torch.testing.assert_close(q.grad, d + STRENGTH * product, rtol=1e-4, atol=1e-7)


class Opaque(torch.autograd.Function):
    """A kernel with a gradient and no second one, as fused attention has."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * (1 - x.tanh() ** 2)


def test_a_model_that_is_not_twice_differentiable():
    """The error names the attention implementation; weights and gradients are those of θ, and the patch is gone."""
    model = nn.Linear(4, 2)
    model.config = types.SimpleNamespace(_attn_implementation="flash_attention_2")
    before, backward = weights(model), torch.autograd.backward
    optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), method="exact", model=model)
    inputs = torch.randn(3, 4)
    closure = closure_of(optimizer, lambda: Opaque.apply(model(inputs)).square().sum())
    with pytest.raises(RuntimeError, match=r"(?s)flash_attention_2.*cannot be differentiated twice.*method='central'"):
        optimizer.step(closure)
    assert_same(weights(model), before)
    assert_same(combined(model.parameters()), closure.gradients[0])
    assert torch.autograd.backward is backward


def errors(method, eps):
    """Distance of the estimate of H·g1 from the truth."""
    torch.manual_seed(0)
    model, loss = regression()
    parameters = list(model.parameters())
    d, product = gradient_and_product(parameters, loss)
    stepped(model, loss, method=method, eps=eps)
    found = [(grad - a) / STRENGTH for grad, a in zip(combined(parameters), d, strict=True)]
    return math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(found, product, strict=True)))


@pytest.mark.parametrize(("method", "order"), [("forward", 1), ("central", 2)])
def test_order_of_the_error(method, order):
    """Ten times shorter a step, ten or a hundred times smaller an error."""
    slope = math.log10(errors(method, 0.1) / errors(method, 0.01))
    assert slope == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("clip", [None, 0.1])
def test_central_is_its_formula(clip):
    """Three calls, at θ, θ − ε·g1 and θ + ε·g1, each side clipped; back at θ, with metrics of what was done."""
    model, loss = regression()
    parameters, before, eps = list(model.parameters()), weights(model), 0.05

    def gradient_at(distance, direction):
        other = copy.deepcopy(model)
        with torch.no_grad():
            for parameter, along in zip(other.parameters(), direction, strict=True):
                parameter += distance * along
        found = torch.autograd.grad(loss(other), list(other.parameters()))
        norm = torch.cat([g.flatten() for g in found]).norm()
        factor = 1.0 if clip is None else min(1.0, clip / (float(norm) + 1e-6))
        return [factor * g for g in found], norm

    g1 = torch.autograd.grad(loss(), parameters)
    (minus, _), (plus, norm) = gradient_at(-eps, g1), gradient_at(eps, g1)
    optimizer, closure = stepped(model, loss, method="central", eps=eps, g1_clip=None, g2_clip=clip)
    expected = [a + STRENGTH / eps * (p - m) / 2 for a, p, m in zip(g1, plus, minus, strict=True)]
    torch.testing.assert_close(combined(parameters), expected, rtol=1e-10, atol=1e-13)
    assert_same(weights(model), before)
    assert closure.calls == 3
    assert float(optimizer.metrics["g2_norm"]) == pytest.approx(float(norm))
    assert bool(optimizer.metrics["g2_clipped"]) == (clip is not None)
    assert float(optimizer.metrics["perturbation_fidelity"]) == pytest.approx(1.0)


def test_central_with_a_parameter_that_only_one_point_reaches():
    """No gradient is a gradient of 0."""
    used, rare = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    start = used.detach().clone()

    def loss():  # beyond θ, where the gradient leads
        return used.square().sum() + (rare.sum() if used.detach().sum() > start.sum() else 0.0)

    optimizer = GradRegOptimizer(torch.optim.SGD([used, rare], lr=0.0), strength=STRENGTH, eps=0.5, method="central")
    optimizer.step(closure_of(optimizer, loss))
    assert_same(rare.grad, torch.full((2,), STRENGTH / 0.5 * 0.5))
    torch.testing.assert_close(used.grad, torch.full((2,), 2 + STRENGTH * 2 * 2.0))


@pytest.mark.parametrize("call", [2, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_central_without_a_finite_side(call, value):
    """The penalty is left out and counted."""
    model, loss = regression()
    optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), method="central")
    closure = closure_of(optimizer, loss)

    def failing():
        found = closure()
        if closure.calls == call:
            next(model.parameters()).grad.fill_(value)
        return found

    optimizer.step(failing)
    assert_same(combined(model.parameters()), closure.gradients[0])
    assert optimizer.metrics["skipped"] == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_exact_under_gradient_checkpointing(reentrant):
    """Recomputed activations are differentiated twice like kept ones; the reentrant kind cannot, and says so."""
    model, loss = regression()
    parameters = list(model.parameters())
    d, product = gradient_and_product(parameters, loss)
    inputs, targets = (cell.cell_contents for cell in loss.__closure__)
    inputs.requires_grad_()  # which the reentrant kind needs

    def checkpointed():
        hidden = torch.utils.checkpoint.checkpoint(model[:2], inputs, use_reentrant=reentrant)
        return (model[2](hidden) - targets).square().mean()

    optimizer = GradRegOptimizer(torch.optim.SGD(parameters, lr=0.0), strength=STRENGTH, method="exact")
    if reentrant:
        with pytest.raises(RuntimeError, match=r"2 of 4 parameters.*reentrant gradient checkpointing.*use_reentrant=False"):
            optimizer.step(closure_of(optimizer, checkpointed))
        return
    optimizer.step(closure_of(optimizer, checkpointed))
    expected = [a + STRENGTH * b for a, b in zip(d, product, strict=True)]
    torch.testing.assert_close(combined(parameters), expected, rtol=1e-12, atol=1e-14)


def test_exact_of_a_compiled_model_is_refused():
    """The compiler writes one backward; the error says what to do."""
    torch.compiler.reset()  # after many compilations of other tests it would leave this model as it is
    model, loss = regression(dtype=torch.float32)
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), method="exact")
    with pytest.raises(RuntimeError, match=r"(?s)cannot be differentiated twice.*without torch.compile"):
        optimizer.step(closure_of(optimizer, lambda: loss(compiled)))
