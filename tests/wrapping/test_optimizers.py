"""Every optimizer that people wrap steps on the formula's gradient, and its state dict continues where it ended."""

import copy
import io
import os

import pytest
import torch
from optimizers import AMPLIFIES, KINDS, is_common
from problems import assert_same, closure_of, unchecked, weights
from reference import combined, gradient_of
from torch import nn

# Optimizers of other packages warn of what they please.
pytestmark = pytest.mark.filterwarnings("ignore")
STRENGTH = EPS = 0.1
SETTINGS = {"strength": STRENGTH, "eps": EPS, "g1_clip": None, "g2_clip": None}
TRIED = KINDS if os.environ.get("EVERY_OPTIMIZER") else [kind for kind in KINDS if is_common(kind)]
"""`make optimizers` tries all; each of the others does what one of these does."""
each_kind = pytest.mark.parametrize("kind", TRIED, ids=[kind.path for kind in TRIED])


@pytest.fixture(autouse=True)
def _eagerly():
    """Without a compiler, which several of them call on every step."""
    with torch.compiler.set_stance("force_eager"):
        yield


def problem():
    """A network whose matrix of 4096 elements is the smallest that 8-bit and 4-bit states are kept for, and its data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 16))
    return model, torch.randn(32, 64), torch.randn(32, 16)


def built(kind, model):
    pytest.importorskip(kind.module, reason=f"{kind.module} is not installed")
    optimizer = kind(model)
    getattr(optimizer, "train", int)()  # schedule-free ones ask for it
    return optimizer


def loss_of(model, inputs, targets):
    return lambda: (model(inputs) - targets).square().mean()


def formula(model, parameters, inputs, targets):
    """g1 + (γ/ε)·(g2 − g1) over ``parameters``, and g1, in float64."""
    wide = copy.deepcopy(model).double()
    chosen = {id(parameter) for parameter in parameters}
    moved = [b for a, b in zip(model.parameters(), wide.parameters(), strict=True) if id(a) in chosen]
    gradient_at = gradient_of(moved, loss_of(wide, inputs.double(), targets.double()))
    return combined(gradient_at, strength=STRENGTH, eps=EPS), gradient_at()


def trained(optimizer):
    """Its parameters, in the order of the model: optimizers sort them into groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def step_on(optimizer, gradients, number):
    for parameter, gradient in gradients.items():
        parameter.grad = gradient.float()
    torch.manual_seed(number)  # for those that draw random numbers
    optimizer.step()


def step_wrapped(optimizer, model, data, number):
    closure = closure_of(optimizer, loss_of(model, *data))
    torch.manual_seed(number)
    optimizer.step(closure)


def step_bare(optimizer, model, data, number):
    model.zero_grad()
    loss_of(model, *data)().backward()
    torch.manual_seed(number)
    optimizer.step()


@each_kind
def test_two_steps_follow_the_formula(kind, record_property):
    """It steps on the gradient of the formula, and moves as the bare optimizer does on this gradient, bit for bit."""
    model, *data = problem()
    models = [model, copy.deepcopy(model), copy.deepcopy(model)]
    base, bare, exact = (built(kind, each) for each in models)
    wrapped, seen = unchecked(base, **SETTINGS), []
    base.register_step_pre_hook(lambda *_: seen.append({id(p): p.grad.clone() for p in trained(base)}))
    pairs = zip(models, (base, bare, exact), strict=True)
    in_order = [[p for p in each.parameters() if p in set(trained(optimizer))] for each, optimizer in pairs]
    for number in range(2):
        expected, plain = formula(models[0], in_order[0], *data)
        step_wrapped(wrapped, models[0], data, number)
        found = [seen[-1][id(parameter)] for parameter in in_order[0]]
        for gradient, regularized, without in zip(found, expected, plain, strict=True):
            size = float(regularized.abs().max())
            # float32, and (g2 − g1)·γ/ε rounds once more.
            assert float((gradient - regularized).abs().max()) < 1e-5 * size
            assert float((without - regularized).abs().max()) > 1e-3 * size
        step_on(bare, dict(zip(in_order[1], found, strict=True)), number)
        step_on(exact, dict(zip(in_order[2], formula(models[2], in_order[2], *data)[0], strict=True)), number)
        assert_same(weights(models[0]), weights(models[1]))
    distances = [float((a - b).abs().max()) for a, b in zip(weights(models[0]), weights(models[2]), strict=True)]
    record_property("difference", max(distances))
    if kind.path not in AMPLIFIES:
        assert max(distances) <= kind.tolerance


def continued(kind, wrap, step):
    """The weights after a third step, straight on and with everything loaded into a new optimizer before it."""
    model, *data = problem()
    optimizer = wrap(built(kind, model))
    for number in range(2):
        step(optimizer, model, data, number)
    other, file = copy.deepcopy(model), io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = wrap(built(kind, other))
    loaded.load_state_dict(torch.load(file, weights_only=False))
    step(optimizer, model, data, 2)
    step(loaded, other, data, 2)
    return weights(model), weights(other)


@each_kind
def test_a_state_dict_continues(kind):
    """A new optimizer with the saved state takes the same third step, bit for bit, wherever the bare one does."""
    straight, resumed = continued(kind, lambda bare: bare, step_bare)
    if any(not torch.equal(a, b) for a, b in zip(straight, resumed, strict=True)):
        pytest.skip("it does not continue bare: its state dict does not hold all of its state")
    straight, resumed = continued(kind, lambda bare: unchecked(bare, **SETTINGS), step_wrapped)
    assert_same(resumed, straight)
