"""Optimizers that cannot be wrapped are refused before anything is changed, by name and by what their step demands."""

import functools

import pytest
import torch
from problems import every_optimizer, regression
from torch import nn

from gradreg_optim import GradRegOptimizer

IN_BACKWARD = [
    "Lomo",
    "AdaLomo",
    "LOMO",
    "AdaLOMO",
    "LayerWiseDummyOptimizer",
    "DummyOptimizer",
    "OptimizersInBackwardContainer",
    "GradientReleaseOptimizerWrapper",
    "CPUOffloadOptimizer",
]


def parameters():
    return [nn.Parameter(torch.ones(2))]


def refuse(optimizer, match):
    before = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(ValueError, match=match):
        GradRegOptimizer(optimizer)
    assert [dict(group) for group in optimizer.param_groups] == before


@pytest.mark.parametrize("name", IN_BACKWARD)
def test_optimizers_known_to_step_in_the_backward(name):
    """By the names under which LOMO, layerwise updates, gradient release and offloading optimizers go."""
    refuse(
        type(name, (torch.optim.SGD,), {})(parameters(), lr=0.1),
        f"optimizer={name}: it takes its steps in the backward",
    )


def test_gradient_release():
    """An optimizer that is set up to be called with single parameters in the backward."""
    optimizer = torch.optim.SGD(parameters(), lr=0.1)
    optimizer.defaults["gradient_release"] = False
    GradRegOptimizer(optimizer)
    optimizer = torch.optim.SGD(parameters(), lr=0.1)
    optimizer.defaults["gradient_release"] = True
    refuse(optimizer, "it takes its steps in the backward")


def test_parameters_with_optimizers_of_their_own():
    """What torch calls an optimizer in the backward leaves its mark on parameters."""
    optimizer = torch.optim.SGD(parameters(), lr=0.1)
    optimizer.param_groups[0]["params"][0]._in_backward_optimizers = [object()]
    refuse(optimizer, "it takes its steps in the backward")


class Required(torch.optim.SGD):
    def step(self, closure):
        return closure()


class RequiredUnderAnotherName(torch.optim.SGD):
    def step(self, loss):
        return loss


class SAM(torch.optim.SGD):
    """Sharpness-aware minimization of one's own, which says nothing in its signature."""


class AliG(torch.optim.SGD):
    """Named like a published one."""


@pytest.mark.parametrize("cls", [Required, RequiredUnderAnotherName, SAM, AliG], ids=lambda cls: cls.__name__)
def test_optimizers_that_insist_on_a_closure(cls):
    """By signature, by how their step begins, and by name: at construction, not in the first step."""
    refuse(
        cls(parameters(), lr=0.1),
        f"optimizer={cls.__name__}: its step needs a closure, or makes the gradient by itself",
    )


class Optional(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure=None):
        if closure is None:
            return super().step()
        if closure is not None:
            raise ValueError("no closures here")
        return None


class WithoutClosures(torch.optim.SGD):
    def step(self, closure=None):
        assert closure is None
        return super().step()


class NoArgument(torch.optim.SGD):
    def step(self):
        return super().step()


class Anything(torch.optim.SGD):
    def step(self, *args, **kwargs):
        return super().step()


@pytest.mark.parametrize("cls", [Optional, WithoutClosures, NoArgument, Anything], ids=lambda cls: cls.__name__)
def test_optimizers_that_step_on_gradients(cls):
    """Whatever can be called without a closure is wrapped, and steps."""
    model, loss = regression()
    optimizer = GradRegOptimizer(cls(model.parameters(), lr=0.1))

    def closure():
        optimizer.zero_grad()
        loss().backward()

    optimizer.step(closure)
    assert optimizer.step_count == 1


@pytest.mark.parametrize("optimizer_class", **every_optimizer)
def test_all_of_torch_is_wrapped(optimizer_class):
    """No optimizer of torch is refused, nor one that a scheduler has patched, nor one whose source is not there."""
    optimizer = optimizer_class([nn.Parameter(torch.ones(2, 2))], lr=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    GradRegOptimizer(optimizer)
    scope = {"SGD": torch.optim.SGD}
    exec("class Typed(SGD):\n    def step(self, closure=None):\n        pass", scope)
    GradRegOptimizer(scope["Typed"](parameters(), lr=0.1))


def test_the_first_argument_is_described_by_its_type():
    """A model, parameters or a factory in the place of the optimizer."""
    model, _ = regression()
    for wrong, words in (
        (model, "optimizer=<Sequential> is a Sequential: "),
        (list(model.parameters()), "optimizer=<list> is a list: "),
        (torch.optim.AdamW, "optimizer=<class 'torch.optim.adamw.AdamW'> is a type: "),
        (functools.partial(torch.optim.AdamW, lr=0.1), "optimizer=<partial> is a partial: "),
    ):
        with pytest.raises(TypeError, match=words):
            GradRegOptimizer(wrong)
