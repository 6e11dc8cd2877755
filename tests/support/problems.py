"""Small losses with known answers, and the usual closure around them."""

import copy
import inspect

import torch
from torch import nn
from torch.optim import Optimizer

from gradreg_optim import GradRegOptimizer

# LBFGS brings a closure of its own and SparseAdam wants sparse gradients: test_errors.py sees both refused.
DENSE_OPTIMIZERS = [
    entry
    for entry in vars(torch.optim).values()
    if inspect.isclass(entry) and issubclass(entry, Optimizer) and entry.__name__ not in ("Optimizer", "LBFGS", "SparseAdam")
]

every_optimizer = {"argvalues": DENSE_OPTIMIZERS, "ids": [entry.__name__ for entry in DENSE_OPTIMIZERS]}


def unchecked(optimizer, **settings):
    """The wrapper without the check of its first step: each step is the formula's passes and nothing else."""
    return GradRegOptimizer(optimizer, **{"check_every": 0, **settings})


def closure_of(optimizer, loss, scale=lambda value: value):
    """The usual closure; ``closure.calls`` counts, ``closure.gradients`` keeps what each call left in ``.grad``."""

    def closure():
        optimizer.zero_grad()
        value = loss()
        scale(value).backward()
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        closure.gradients.append([None if p.grad is None else p.grad.detach().clone() for p in parameters])
        closure.calls += 1
        return value

    closure.calls, closure.gradients = 0, []
    return closure


class Quadratic:
    """½ tr(WᵀAW) with integer A and W: gradient AW, Hessian A, and no rounding anywhere in a first step."""

    def __init__(self, rows=4, columns=3):
        root = torch.randint(-3, 4, (rows, rows)).double()
        self.hessian = root @ root.T + torch.eye(rows, dtype=torch.float64)
        self.weight = nn.Parameter(torch.randint(-4, 5, (rows, columns)).double())

    def __call__(self):
        return 0.5 * (self.weight * (self.hessian @ self.weight)).sum()


def regression(*hidden, dtype=torch.float64, count=16):
    """A tanh network or, with layers in ``hidden``, a network with these in the middle; and its loss on fixed data."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), *hidden, nn.Linear(6, 2)).to(dtype)
    inputs, targets = torch.randn(count, 4, dtype=dtype), torch.randn(count, 2, dtype=dtype)

    def loss(model=model):
        return (model(inputs) - targets).square().mean()

    return model, loss


def twin_of(model, loss):
    """A copy of ``model`` and the same loss on it."""
    other = copy.deepcopy(model)
    return other, lambda: loss(other)


# One step, by each of the ways to drive it.


def by_closure(optimizer, loss):
    optimizer.step(closure_of(optimizer, loss))


def by_loop(optimizer, loss):
    for _ in optimizer.passes():
        closure_of(optimizer, loss)()
    optimizer.step()


def past_the_first_step(optimizer):
    """As after a regularized step that found nothing: what is read once has been read."""
    optimizer._losses.is_integral = True
    optimizer.progress.is_proven = True
    for group in optimizer.param_groups:
        group["gradreg_is_low"] = any(p.dtype.itemsize < 4 for p in group["params"])
        group["gradreg_floor"] = 0.01
    return optimizer


def leave_unread(monkeypatch):
    """Let no scalar of a step be read, as on a device."""
    for module in ("schemes", "regularize", "strength"):
        monkeypatch.setattr(f"gradreg_optim.core.{module}.item_on_cpu", lambda value: value)


def weights(source):
    """Copies of all parameters of a module or an optimizer."""
    if isinstance(source, nn.Module):
        return [parameter.detach().clone() for parameter in source.parameters()]
    return [parameter.detach().clone() for group in source.param_groups for parameter in group["params"]]


def assert_same(actual, expected):
    """Bitwise equality of nested lists and dicts of tensors and numbers, NaN equal to NaN."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
