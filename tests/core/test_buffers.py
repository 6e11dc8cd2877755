"""Buffers that forwards move: every pass starts from the same values, and they move once, as the first pass left them."""

import copy
import weakref
from contextlib import suppress

import pytest
import torch
from problems import assert_same, closure_of
from torch import nn
from torch.func import functional_call
from torch.nn.modules import module as nn_module
from torch.utils.checkpoint import checkpoint

from gradreg_optim import GradRegOptimizer, MicroBatches
from gradreg_optim.core import repeatable
from gradreg_optim.core.repeatable import Buffers

SIZE = 6
SETTINGS = {"strength": 0.01, "eps": 1e-3, "g1_clip": None, "g2_clip": None}


class Moving(nn.Module):
    """Divides by running numbers that ``update`` moves, and uses them after they have moved."""

    def __init__(self, update, **state):
        super().__init__()
        self.update = update
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                self.register_buffer(name, value.double() if value.is_floating_point() else value)
            else:
                setattr(self, name, value)

    def forward(self, x):
        with torch.no_grad():
            scale = self.update(self, x.square().mean(0))
        return x / (1 + scale)


def in_place(self, now):
    return self.scale.mul_(0.5).add_(0.5 * now)


def through_data(self, now):
    self.scale.data.mul_(0.5).add_(0.5 * now)
    return self.scale


def replaced(self, now):
    self.scale = 0.5 * self.scale + 0.5 * now
    return self.scale


def resized(self, now):
    self.scale.resize_(now.shape).copy_(now * (1 + self.count))
    self.count += 1
    return self.scale


def registered(self, now):
    if "scale" not in self._buffers:
        self.register_buffer("scale", now.clone())
    return self.scale.mul_(0.5).add_(now)


def first_batch(self, now):
    if not self.begun:
        self.scale.data.copy_(now)
        self.begun.data.fill_(True)
    return self.scale


def codebook(self, now):
    """An exponential average of the inputs nearest to each entry, written through ``.data``."""
    nearest = (self.book - now.unsqueeze(0)).abs().sum(1).argmin()
    self.count.data[nearest] += 1
    self.book.data[nearest] = 0.5 * self.book[nearest] + 0.5 * now
    return self.book[nearest]


zeros = torch.zeros(SIZE)
LAYERS = {
    "spectral_norm, hooks": lambda: nn.utils.spectral_norm(nn.Linear(SIZE, SIZE)),
    "spectral_norm, parametrization": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(SIZE, SIZE)),
    "BatchNorm": lambda: nn.BatchNorm1d(SIZE),
    "cumulative average": lambda: nn.BatchNorm1d(SIZE, momentum=None),
    "without statistics": lambda: nn.BatchNorm1d(SIZE, track_running_stats=False),
    "in place": lambda: Moving(in_place, scale=zeros.clone()),
    "through .data": lambda: Moving(through_data, scale=zeros.clone()),
    "replaced": lambda: Moving(replaced, scale=zeros.clone()),
    "replaced, a plain attribute": lambda: Moving(replaced, scale=0.0),
    "resized": lambda: Moving(resized, scale=torch.zeros(0), count=torch.tensor(0)),
    "registered in a forward": lambda: Moving(registered),
    "initialized by the first batch": lambda: Moving(first_batch, scale=zeros.clone(), begun=torch.tensor(False)),
    "a codebook": lambda: Moving(codebook, book=torch.randn(4, SIZE), count=torch.zeros(4)),
}


def network(layer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, SIZE), nn.Tanh(), LAYERS[layer](), nn.Linear(SIZE, 2)).double()
    inputs, targets = torch.randn(16, 4).double(), torch.randn(16, 2).double()
    return model, lambda model, part=slice(None): (model(inputs[part]) - targets[part]).square().sum() / 32


def gradient_at(model, shift, loss):
    """The gradient of ``loss`` of a copy of ``model``, moved along ``shift``, and the copy as the pass left it."""
    weight = vars(model[2]).get("weight")  # of a spectral norm: the result of an operation, which cannot be copied
    if weight is not None:
        vars(model[2])["weight"] = weight.detach()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, along in zip(other.parameters(), shift or [], strict=False):
            parameter += along
    value = loss(other)
    gradients = torch.autograd.grad(value, list(other.parameters()), create_graph=True)
    return gradients, other


def formula(model, loss, method):
    """g1 + γ·Δ from passes that all start from the buffers of ``model``, and the model after the pass at θ."""
    g1, after = gradient_at(model, None, loss)
    strength, eps = SETTINGS["strength"], SETTINGS["eps"]
    if method == "exact":
        inner = sum((g * g.detach()).sum() for g in g1)
        delta = torch.autograd.grad(inner, list(after.parameters()), allow_unused=True)
    elif method == "central":
        sides = [gradient_at(model, [sign * eps * g for g in g1], loss)[0] for sign in (1, -1)]
        delta = [(a - b) / (2 * eps) for a, b in zip(*sides, strict=True)]
    else:
        delta = [(b - a) / eps for a, b in zip(g1, gradient_at(model, [eps * g for g in g1], loss)[0], strict=True)]
    return [(g + strength * d).detach() for g, d in zip(g1, delta, strict=True)], after


def by_closure(optimizer, model, loss):
    optimizer.step(closure_of(optimizer, lambda: loss(model)))


def by_loop(optimizer, model, loss):
    for _ in optimizer.passes():
        optimizer.zero_grad()
        loss(model).backward()
    optimizer.step()


def by_micro_batches(optimizer, model, loss):
    def backward(part):
        value = loss(model, part)
        value.backward()
        return value

    optimizer.step(MicroBatches(backward, [slice(0, 8), slice(8, 16)]))


def in_two_parts(loss):
    return lambda model: loss(model, slice(0, 8)) + loss(model, slice(8, 16))


def state_of(model):
    plain = {name: value for name, value in vars(model[2]).items() if name == "scale"}
    return [dict(model.named_buffers()), plain]


@pytest.mark.parametrize("driver", [by_closure, by_loop, by_micro_batches])
@pytest.mark.parametrize("method", ["forward", "central", "exact"])
@pytest.mark.parametrize("layer", LAYERS)
def test_all_passes_start_from_the_same_buffers(layer, method, driver):
    """The update is the formula's, by passes from the same buffers; after the step they are as after one pass at θ."""
    model, loss = network(layer)
    whole = in_two_parts(loss) if driver is by_micro_batches else loss
    optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), method=method, **SETTINGS)
    for _ in range(3):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        expected, after = formula(model, whole, method)
        driver(optimizer, model, loss)
        got = [start - parameter.detach() for start, parameter in zip(before, model.parameters(), strict=True)]
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)  # g2 − g1 rounds before it is divided by eps
        assert_same(state_of(model), state_of(after))


@pytest.mark.parametrize("layer", ["spectral_norm, hooks", "BatchNorm", "replaced", "a codebook"])
def test_a_part_of_the_micro_batches_starts_where_it_did(layer, monkeypatch):
    """With ``fraction``, the repeated micro-batch starts from the buffers that it found in the first pass."""
    monkeypatch.setattr("gradreg_optim.drivers.micro_batches.chosen_part", lambda *_args, **_kwargs: frozenset({1}))
    model, loss = network(layer)
    optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), fraction=0.5, **SETTINGS)
    for _ in range(2):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        first, middle = gradient_at(model, None, lambda model: loss(model, slice(0, 8)))
        second, after = gradient_at(middle, None, lambda model: loss(model, slice(8, 16)))
        g1 = [(a + b).detach() for a, b in zip(first, second, strict=True)]
        moved, _ = gradient_at(middle, [1e-3 * g for g in g1], lambda model: loss(model, slice(8, 16)))
        expected = [(g + 10 * 2 * (b - a)).detach() for g, a, b in zip(g1, second, moved, strict=True)]
        by_micro_batches(optimizer, model, loss)
        got = [start - parameter.detach() for start, parameter in zip(before, model.parameters(), strict=True)]
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)  # g2 − g1 rounds before it is divided by eps
        assert_same(state_of(model), state_of(after))


@pytest.mark.parametrize("known", [True, False], ids=["model given", "model found"])
def test_another_network_than_the_model(known):
    """BatchNorm of a discriminator in the generator's step moves once, although ``model`` is the generator."""
    generator = nn.Linear(4, 8)
    critic = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    inputs = torch.randn(16, 4)
    optimizer = GradRegOptimizer(torch.optim.SGD(generator.parameters(), lr=0.1), model=generator if known else None)
    for step in range(3):
        expected = copy.deepcopy(critic)
        expected(generator(inputs))
        optimizer.step(closure_of(optimizer, lambda: -critic(generator(inputs)).mean()))
        assert critic[1].num_batches_tracked == step + 1
        assert_same(list(critic.buffers()), list(expected.buffers()))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_forwards_move_buffers_as_they_do_without(use_reentrant):
    """A forward that runs again in backward moves its buffers again, once in each pass; the step keeps the first pass's."""
    model, _ = network("in place")
    inputs = torch.randn(16, 4, requires_grad=True).double()
    optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), **SETTINGS)
    found = []

    def closure():
        optimizer.zero_grad()
        found.append(model[2].scale.clone())
        value = checkpoint(model, inputs, use_reentrant=use_reentrant).square().mean()
        value.backward()
        found.append(model[2].scale.clone())
        return value

    optimizer.step(closure)
    assert_same(found[2], found[0])
    assert (found[1] != found[0]).any()
    assert_same(model[2].scale, found[1])


def functional(model, buffers):
    return lambda inputs: functional_call(model, buffers, (inputs,))


@pytest.mark.parametrize("layer", ["in place", "BatchNorm"])
def test_modules_called_by_torch_func(layer):
    """``functional_call`` puts other buffers into the module: they are the ones that move, and once."""
    model, loss = network(layer)
    own = {name: buffer.clone() for name, buffer in model.named_buffers()}
    buffers, expected = copy.deepcopy(own), copy.deepcopy(own)
    optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), **SETTINGS)
    for _ in range(2):
        loss(functional(model, expected))
        optimizer.step(closure_of(optimizer, lambda: loss(functional(model, buffers))))
        assert_same(buffers, expected)
        assert_same(dict(model.named_buffers()), own)


def test_a_dictionary_in_which_buffers_are_replaced():
    """It is the caller's, out of reach: the change of the loss gives it away."""
    model, loss = network("replaced")
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), **SETTINGS)
    with pytest.raises(RuntimeError, match="not a function of the weights"):
        optimizer.step(closure_of(optimizer, lambda: loss(functional(model, buffers))))


def test_a_module_within_a_transform():
    """Under ``vmap`` the buffers of an ensemble are batched tensors: what they hold moves once."""
    layer = nn.BatchNorm1d(3)
    parameters, buffers = torch.func.stack_module_state([nn.BatchNorm1d(3) for _ in range(2)])
    expected = {name: buffer.clone() for name, buffer in buffers.items()}
    parameters = {name: nn.Parameter(parameter.detach()) for name, parameter in parameters.items()}
    inputs = torch.randn(5, 3)

    def outputs(buffers):
        return torch.vmap(lambda p, b: functional_call(layer, (p, b), (inputs,)))(parameters, buffers)

    outputs(expected)
    optimizer = GradRegOptimizer(torch.optim.SGD(parameters.values(), lr=0.1))
    optimizer.step(closure_of(optimizer, lambda: outputs(buffers).square().mean() + parameters["weight"].square().sum()))
    assert_same(buffers, expected)


# What is copied.


def passes(buffers, model, inputs, count=2):
    with buffers.first(None):
        model(inputs)
    for _ in range(count - 1):
        with buffers.repeated():
            model(inputs)


@pytest.fixture
def copies(monkeypatch):
    """The sizes of all copies that are made of buffers."""
    made = []

    def copied(tensor, *, is_sure):
        made.append(tensor.numel())
        return tensor.clone()

    monkeypatch.setattr(repeatable, "copied", copied)
    return made


def test_what_never_moves_is_copied_once(copies, monkeypatch):
    """A large mask in the first step alone, a small one too, unless it is changed from outside; what moves in each step."""
    monkeypatch.setattr(repeatable, "SMALL", 800)
    model = Moving(in_place, scale=torch.zeros(3))
    model.add_module("masks", nn.Module())
    model.masks.register_buffer("large", torch.ones(1000))
    model.masks.register_buffer("small", torch.ones(50))
    buffers, inputs = Buffers(), torch.randn(5, 3).double()
    passes(buffers, model, inputs)
    assert sorted(copies) == [3, 3, 50, 1000]
    for _ in range(3):
        copies.clear()
        passes(buffers, model, inputs)
        assert copies == [3, 3]
    model.masks.small.mul_(2)
    model.masks.large.mul_(2)
    copies.clear()
    passes(buffers, model, inputs)
    assert sorted(copies) == [3, 3, 50]


@pytest.mark.parametrize("update", [in_place, replaced])
def test_a_buffer_that_begins_to_move_later(update):
    """It is right in that step too: a copy was at hand."""
    switch = torch.tensor(False)
    model = Moving(lambda self, now: update(self, now) if switch else self.scale, scale=torch.zeros(3))
    buffers, inputs = Buffers(), torch.randn(5, 3).double()
    passes(buffers, model, inputs)
    switch.fill_(True)
    for _ in range(2):
        expected = copy.deepcopy(model)
        expected(inputs)
        passes(buffers, model, inputs, count=3)
        assert_same(model.scale, expected.scale)


def test_a_module_that_is_trained_again():
    """BatchNorm writes its statistics without a mark: a change of mode is what lets all be looked at anew."""
    model = nn.Sequential(nn.BatchNorm1d(3).eval())
    buffers, inputs = Buffers(), torch.randn(5, 3) + 1
    passes(buffers, model, inputs)
    assert model[0].num_batches_tracked == 0
    model.train()
    expected = copy.deepcopy(model)
    expected(inputs)
    passes(buffers, model, inputs)
    assert_same(list(model.buffers()), list(expected.buffers()))


def test_a_large_buffer_that_begins_to_move_later_is_named(monkeypatch):
    """There is no copy in that one step, which a warning says; it moves once nevertheless, and later steps are right."""
    monkeypatch.setattr(repeatable, "SMALL", 8)
    switch = torch.tensor(False)
    model = Moving(lambda self, now: in_place(self, now) if switch else self.scale, scale=torch.zeros(3))
    buffers, inputs = Buffers(), torch.randn(5, 3).double()
    passes(buffers, model, inputs)
    switch.fill_(True)
    expected = copy.deepcopy(model)
    expected(inputs)
    with pytest.warns(UserWarning, match=r"the buffer 'scale' of shape \(3,\) has begun to move"):
        passes(buffers, model, inputs)
    assert_same(model.scale, expected.scale)
    expected(inputs)
    passes(buffers, model, inputs)
    assert_same(model.scale, expected.scale)


def test_a_version_that_changes_without_the_value():
    """As under DistributedDataParallel, which broadcasts all buffers in each forward: nothing moves, nothing is said."""
    model = Moving(lambda self, now: self.mask.copy_(self.mask.clone()), mask=torch.ones(3))
    buffers, inputs = Buffers(), torch.randn(5, 3).double()
    for _ in range(3):
        passes(buffers, model, inputs)
    assert_same(model.mask, torch.ones(3).double())


@pytest.mark.parametrize(
    "buffer",
    [
        torch.arange(3).expand(4, 3),
        torch.eye(3).to_sparse(),
        torch.zeros(2, dtype=torch.complex128),
        torch.zeros(2, dtype=torch.float8_e4m3fn),
        torch.full((2,), float("nan")),
        torch.zeros(2, device="meta"),
        nn.Parameter(torch.ones(2)),
        None,
    ],
    ids=["expanded", "sparse", "complex", "float8", "nan", "meta", "parameter", "None"],
)
def test_buffers_of_every_kind(buffer):
    """They lie beside one that moves, which moves once."""
    model = Moving(in_place, scale=torch.zeros(3))
    model.register_buffer("other", buffer)
    expected = copy.deepcopy(model)
    buffers, inputs = Buffers(), torch.randn(5, 3).double()
    for _ in range(2):
        expected(inputs)
        passes(buffers, model, inputs)
        assert_same(model.scale, expected.scale)
        assert model.other is buffer


def test_the_hook_does_not_outlive_the_pass():
    """Finding modules leaves no hook behind, also after an exception; nor does it keep modules alive."""
    hooks = len(nn_module._global_forward_pre_hooks)
    buffers, model = Buffers(), nn.BatchNorm1d(3)
    with suppress(KeyboardInterrupt), buffers.first(None):
        assert len(nn_module._global_forward_pre_hooks) == hooks + 1
        model(torch.randn(5, 3))
        raise KeyboardInterrupt
    assert len(nn_module._global_forward_pre_hooks) == hooks
    passes(buffers, model, torch.randn(5, 3))
    gone = weakref.ref(model)
    del model
    buffers.begin()
    assert gone() is None


def test_buffers_come_back_after_an_exception():
    """A second pass that fails in the middle has not moved them."""
    model, buffers, inputs = nn.BatchNorm1d(3), Buffers(), torch.randn(5, 3)
    with buffers.first(None):
        model(inputs)
    before = [buffer.clone() for buffer in model.buffers()]
    with suppress(KeyboardInterrupt), buffers.repeated():
        model(inputs)
        raise KeyboardInterrupt
    assert_same(list(model.buffers()), before)
