"""Buffers that forwards move: every pass starts from the same values, and they move once, as the first pass left them."""

import copy
import weakref
from contextlib import ExitStack, suppress

import pytest
import torch
from problems import assert_same, closure_of, unchecked
from reference import combined
from torch import nn
from torch.func import functional_call
from torch.nn.modules import module as nn_module
from torch.utils.checkpoint import checkpoint

from gradreg_optim.core.module_state import ModuleState

SIZE = 6
SETTINGS = {"strength": 0.01, "eps": 1e-3, "g1_clip": None, "g2_clip": None}


class Moving(nn.Module):
    """Divides by running numbers that ``update`` moves, and uses them after they have moved."""

    def __init__(self, update, **state):
        super().__init__()
        self.update = update
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
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


def counted(self, now):
    self.calls += 1
    return now * self.calls / 10


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
    "a counter in an attribute": lambda: Moving(counted, calls=0),
    "a frozen parameter": lambda: Moving(in_place, scale=nn.Parameter(zeros.double(), requires_grad=False)),
    "a codebook": lambda: Moving(codebook, book=torch.randn(4, SIZE), count=torch.zeros(4)),
}


def network(layer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, SIZE), nn.Tanh(), LAYERS[layer](), nn.Linear(SIZE, 2)).double()
    inputs, targets = torch.randn(16, 4).double(), torch.randn(16, 2).double()
    return model, lambda model, part=slice(None): (model(inputs[part]) - targets[part]).square().sum() / 32


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def gradient_at(model, loss, direction=None, distance=0.0):
    """The gradient of ``loss`` of a copy of ``model``, moved along ``direction``, and the copy as the pass left it."""
    # Of a spectral norm: the result of an operation, which cannot be copied.
    weight = vars(model[2]).get("weight")
    if weight is not None:
        vars(model[2])["weight"] = weight.detach()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, along in zip(trained(other), direction or [], strict=False):
            parameter += distance * along
    return list(torch.autograd.grad(loss(other), trained(other))), other


def formula(model, loss, method):
    """g1 + γ·Δ from passes that all start from the buffers of ``model``, and the model after the pass at θ."""
    expected = combined(lambda *step: gradient_at(model, loss, *step)[0], strength=0.01, eps=1e-3, method=method)
    return expected, gradient_at(model, loss)[1]


def by_closure(optimizer, model, loss):
    optimizer.step(closure_of(optimizer, lambda: loss(model)))


def by_loop(optimizer, model, loss):
    for _ in optimizer.passes():
        optimizer.zero_grad()
        loss(model).backward()
    optimizer.step()


def state_of(model):
    plain = {name: value for name, value in vars(model[2]).items() if name in ("scale", "calls")}
    return [
        dict(model.named_buffers()),
        plain,
        [p.detach() for p in model.parameters() if not p.requires_grad],
    ]


MANY = [(layer, "forward", by_closure) for layer in LAYERS]
MANY += [(layer, method, by_loop) for layer in ("BatchNorm", "replaced", "a codebook") for method in ("forward", "central")]


@pytest.mark.parametrize(("layer", "method", "driver"), MANY, ids=lambda value: getattr(value, "__name__", value))
def test_all_passes_start_from_the_same_buffers(layer, method, driver):
    """The update is the formula's, by passes from the same buffers; after the step they are as after one pass at θ."""
    model, loss = network(layer)
    optimizer = unchecked(torch.optim.SGD(trained(model), lr=1.0), method=method, **SETTINGS)
    for _ in range(3):
        before = [parameter.detach().clone() for parameter in trained(model)]
        expected, after = formula(model, loss, method)
        driver(optimizer, model, loss)
        got = [start - parameter.detach() for start, parameter in zip(before, trained(model), strict=True)]
        # g2 − g1 rounds before it is divided by eps.
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
        assert_same(state_of(model), state_of(after))


@pytest.mark.parametrize("known", [True, False], ids=["model given", "model found"])
def test_another_network_than_the_model(known):
    """BatchNorm of a discriminator in the generator's step moves once, although ``model`` is the generator."""
    generator = nn.Linear(4, 8)
    critic = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    inputs = torch.randn(16, 4)
    optimizer = unchecked(torch.optim.SGD(generator.parameters(), lr=0.1), model=generator if known else None)
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
    optimizer = unchecked(torch.optim.SGD(model.parameters(), lr=0.1), **SETTINGS)
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
    optimizer = unchecked(torch.optim.SGD(model.parameters(), lr=0.1), **SETTINGS)
    for _ in range(2):
        loss(functional(model, expected))
        optimizer.step(closure_of(optimizer, lambda: loss(functional(model, buffers))))
        assert_same(buffers, expected)
        assert_same(dict(model.named_buffers()), own)


def test_a_dictionary_in_which_buffers_are_replaced():
    """It is the caller's, out of reach: the change of the loss gives it away."""
    model, loss = network("replaced")
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    optimizer = unchecked(torch.optim.SGD(model.parameters(), lr=0.1), **SETTINGS)
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
    optimizer = unchecked(torch.optim.SGD(parameters.values(), lr=0.1))
    optimizer.step(closure_of(optimizer, lambda: outputs(buffers).square().mean() + parameters["weight"].square().sum()))
    assert_same(buffers, expected)


# What is copied.


def passes(state, model, inputs, count=2):
    with ExitStack() as around:
        state.begin_first(None, around)
        model(inputs)
    state.end()
    for _ in range(count - 1):
        with state.repeated():
            model(inputs)


def copied(state):
    """The sizes of what was copied before the first pass."""
    return sorted(value.tensor.numel() for value in state._values.values() if value.before is not None)


def test_what_never_moves_is_copied_once():
    """A mask in the first step alone; what moves in each step."""
    model = Moving(in_place, scale=torch.zeros(3))
    model.add_module("masks", nn.Module())
    model.masks.register_buffer("mask", torch.ones(1000))
    state, inputs = ModuleState(), torch.randn(5, 3).double()
    passes(state, model, inputs)
    assert copied(state) == [3, 1000]
    for _ in range(3):
        passes(state, model, inputs)
        assert copied(state) == [3]


def test_a_module_that_is_trained_again():
    """BatchNorm writes its statistics without a mark: a change of mode is what lets all be looked at anew."""
    model = nn.Sequential(nn.BatchNorm1d(3).eval())
    buffers, inputs = ModuleState(), torch.randn(5, 3) + 1
    passes(buffers, model, inputs)
    assert model[0].num_batches_tracked == 0
    model.train()
    expected = copy.deepcopy(model)
    expected(inputs)
    passes(buffers, model, inputs)
    assert_same(list(model.buffers()), list(expected.buffers()))


def test_a_version_that_changes_without_the_value():
    """As under DistributedDataParallel, which broadcasts all buffers in each forward: nothing moves, nothing is said."""
    model = Moving(lambda self, now: self.mask.copy_(self.mask.clone()), mask=torch.ones(3))
    buffers, inputs = ModuleState(), torch.randn(5, 3).double()
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
    buffers, inputs = ModuleState(), torch.randn(5, 3).double()
    for _ in range(2):
        expected(inputs)
        passes(buffers, model, inputs)
        assert_same(model.scale, expected.scale)
        assert model.other is buffer


def test_the_hook_does_not_outlive_the_pass():
    """Finding modules leaves no hook behind, also after an exception; nor does it keep modules alive."""
    hooks = len(nn_module._global_forward_pre_hooks)
    buffers, model = ModuleState(), nn.BatchNorm1d(3)
    with suppress(KeyboardInterrupt), ExitStack() as around:
        buffers.begin_first(None, around)
        assert len(nn_module._global_forward_pre_hooks) == hooks + 1
        model(torch.randn(5, 3))
        raise KeyboardInterrupt
    assert len(nn_module._global_forward_pre_hooks) == hooks
    passes(buffers, model, torch.randn(5, 3))
    gone = weakref.ref(model)
    del model
    buffers.begin(None)
    assert gone() is None


def test_buffers_come_back_after_an_exception():
    """A second pass that fails in the middle has not moved them."""
    model, buffers, inputs = nn.BatchNorm1d(3), ModuleState(), torch.randn(5, 3)
    with ExitStack() as around:
        buffers.begin_first(None, around)
        model(inputs)
    buffers.end()
    before = [buffer.clone() for buffer in model.buffers()]
    with suppress(KeyboardInterrupt), buffers.repeated():
        model(inputs)
        raise KeyboardInterrupt
    assert_same(list(model.buffers()), before)
