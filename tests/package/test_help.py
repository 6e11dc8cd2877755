"""What ``help`` shows of the optimizers: their own members, and the inherited ones in a line each."""

import inspect
import pydoc

import pytest
import torch

import gradreg_optim
from gradreg_optim.wrapping.hooks import BRIEFLY


def shown(thing):
    """The lines of ``help(thing)``."""
    return pydoc.plain(pydoc.render_doc(thing)).splitlines()


@pytest.mark.parametrize("name", ["GradRegOptimizer", "GradReg"])
def test_help_is_about_the_class(name):
    """What is inherited from torch's Optimizer, a hundred and eighty lines of it, takes a tenth."""
    lines = shown(getattr(gradreg_optim, name))
    start = next(number for number, line in enumerate(lines) if "inherited from torch.optim" in line)
    assert len(lines) - start < 30
    assert len(shown(torch.optim.Optimizer)) > 200  # what it would be
    assert [line for line in lines if "The hook will be called" in line] == []


@pytest.mark.parametrize("name", BRIEFLY)
def test_a_brief_method_is_torchs(name, monkeypatch):
    """It has torch's signature and one line of its own, and calls what torch has, replaced or not."""
    method, original = getattr(gradreg_optim.GradRegOptimizer, name), getattr(torch.optim.Optimizer, name)
    assert "\n" not in inspect.getdoc(method)
    assert inspect.signature(method) == inspect.signature(original)
    called = []
    monkeypatch.setattr(torch.optim.Optimizer, name, lambda *args, **kwargs: called.append((args, kwargs)))
    optimizer = gradreg_optim.GradRegOptimizer(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1))
    getattr(optimizer, name)("one", other=2)
    assert called == [((optimizer, "one"), {"other": 2})]
