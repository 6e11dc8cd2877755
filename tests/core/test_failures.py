"""Whatever happens in the second pass: the weights come back, bit for bit, and ``.grad`` holds g1."""

import math
import sys
import warnings
from pathlib import Path

import pytest
import torch
from problems import (
    assert_same,
    by_closure,
    by_loop,
    closure_of,
    past_the_first_step,
    regression,
    twin_of,
    unchecked,
    weights,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradreg_optim
from gradreg_optim import GradRegOptimizer


def failing(closure, error, in_call, before_backward=False):
    """``closure``, that raises ``error`` in its call number ``in_call``."""

    def wrapped():
        if before_backward and closure.calls + 1 == in_call:
            raise error
        value = closure()
        if closure.calls == in_call:
            raise error
        return value

    return wrapped


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt(), SystemExit(), StopIteration()], ids=repr)
@pytest.mark.parametrize("early", [True, False], ids=["before backward", "after backward"])
def test_an_exception_in_the_second_pass(error, early):
    """The exception goes on; weights, ``.grad``, state, step count and random numbers are those after one pass."""
    model, loss = regression(nn.Dropout(0.5), nn.BatchNorm1d(6))
    optimizer = unchecked(torch.optim.AdamW(model.parameters(), lr=0.1), strength=0.1, eps=0.5)
    optimizer.step(closure_of(optimizer, loss))
    before = weights(model)
    random = torch.get_rng_state()
    closure = closure_of(optimizer, loss)
    with pytest.raises(type(error)):
        optimizer.step(failing(closure, error, in_call=2, before_backward=early))
    assert_same(weights(model), before)
    assert_same([parameter.grad for parameter in model.parameters()], closure.gradients[0])
    assert optimizer.step_count == 1
    assert all(state["step"] == 1 for state in optimizer.state.values())
    assert model[3].num_batches_tracked == 2
    after = torch.get_rng_state()
    torch.set_rng_state(random)
    loss()
    assert_same(after, torch.get_rng_state())
    optimizer.step(closure_of(optimizer, loss))  # and training goes on
    assert optimizer.step_count == 2


def test_an_exception_in_the_first_pass():
    """It goes on as from any optimizer; nothing has moved."""
    model, loss = regression()
    optimizer = unchecked(torch.optim.SGD(model.parameters(), lr=0.1))
    before = weights(model)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(failing(closure_of(optimizer, loss), KeyboardInterrupt(), in_call=1))
    assert_same(weights(model), before)
    assert optimizer.step_count == 0


def test_an_exception_while_excluded_parameters_have_other_gradients():
    """Every parameter gets its first gradient back: excluded, without one in the first pass, of strength 0."""
    parameters = {name: nn.Parameter(torch.ones(2)) for name in ("layer", "late", "embed", "fixed")}
    groups = [
        {"params": [(name, parameters[name]) for name in ("layer", "late", "embed")]},
        {"params": [("fixed", parameters["fixed"])], "gradreg_strength": 0.0},
    ]
    optimizer = unchecked(torch.optim.SGD(groups, lr=0.1), exclude="embed", g1_clip=None)
    calls = iter([("layer", "embed", "fixed"), ("layer", "late", "embed", "fixed")])

    def loss():
        return sum((parameters[name] ** 3).sum() for name in next(calls)) * parameters["layer"].sum()

    closure = closure_of(optimizer, loss)
    with pytest.raises(ValueError, match="stop"):
        optimizer.step(failing(closure, ValueError("stop"), in_call=2))
    assert_same([parameter.grad for parameter in parameters.values()], closure.gradients[0])
    assert parameters["late"].grad is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_second_gradient_that_is_not_finite(value):
    """The step is the base optimizer's on g1, and counts as skipped."""
    model, loss = regression()
    other, other_loss = twin_of(model, loss)
    optimizer = unchecked(torch.optim.AdamW(model.parameters(), lr=0.1), strength=0.1)
    bare = torch.optim.AdamW(other.parameters(), lr=0.1)
    for number in range(1, 3):
        closure = closure_of(optimizer, loss)

        def spoiled(closure=closure):
            result = closure()
            if closure.calls == 2:
                model[2].bias.grad[1] = value
            return result

        optimizer.step(spoiled)
        bare.step(closure_of(bare, other_loss))
        assert closure.calls == 2
        assert_same(weights(model), weights(other))
        assert optimizer.metrics["skipped"] == number
    optimizer.step(closure_of(optimizer, loss))
    assert optimizer.metrics["skipped"] == 2
    assert optimizer.step_count == 3


def test_a_late_gradient_that_is_not_finite():
    """A parameter that the second pass alone reached, with NaN, has no gradient again: weight decay leaves it alone."""
    w, late = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = unchecked(torch.optim.SGD([w, late], lr=0.1, weight_decay=0.5))
    calls = iter([0.0, math.nan])

    def loss():
        factor = next(calls)
        return w.square().sum() + (factor * late.sum() if factor else 0.0)

    optimizer.step(closure_of(optimizer, loss))
    assert late.grad is None
    assert_same(late.detach(), torch.ones(2))
    assert optimizer.metrics["skipped"] == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_first_gradient_that_is_not_finite(value):
    """No second pass; the base optimizer sees the gradient as it is, and the step counts as skipped."""
    model, loss = regression()
    other, other_loss = twin_of(model, loss)
    optimizer = unchecked(torch.optim.SGD(model.parameters(), lr=0.1))
    bare = torch.optim.SGD(other.parameters(), lr=0.1)
    closures = []
    for current, its_loss, its_model in ((optimizer, loss, model), (bare, other_loss, other)):
        closure = closure_of(current, its_loss)

        def spoiled(closure=closure, its_model=its_model):
            result = closure()
            its_model[0].weight.grad[0, 0] = value
            return result

        current.step(spoiled)
        closures.append(closure)
    assert closures[0].calls == 1
    assert_same(weights(model), weights(other))
    assert not model[0].weight.isfinite().all()
    assert optimizer.metrics["skipped"] == 1
    assert not math.isfinite(optimizer.metrics["g1_norm"])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_the_second_pass_spoils(value):
    """A second pass that overwrites its weights with NaN or inf has not touched θ."""
    model, loss = regression()
    optimizer = unchecked(torch.optim.SGD(model.parameters(), lr=0.0))
    before = weights(model)
    closure = closure_of(optimizer, loss)

    def spoiling():
        result = closure()
        if closure.calls == 2:
            with torch.no_grad():
                model[0].weight.fill_(value)
        return result

    optimizer.step(spoiling)
    assert_same(weights(model), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_theta_is_restored_to_the_bit(dtype):
    """With a learning rate of 0, steps at any ε leave every bit of the weights where it was."""
    model, loss = regression(dtype=dtype)
    before = weights(model)
    for settings in ({"eps": 1e-3}, {"eps": 10.0}, {"radius": 0.02}):
        optimizer = unchecked(torch.optim.SGD(model.parameters(), lr=0.0), check_every=0, **settings)
        closure = closure_of(optimizer, loss)
        optimizer.step(closure)
        assert closure.calls == 2
    assert_same(weights(model), before)


def test_a_second_pass_that_leaves_no_gradient():
    """A closure that does nothing the second time is an error, and leaves g1."""
    model, loss = regression()
    optimizer = unchecked(torch.optim.SGD(model.parameters(), lr=0.1))
    closure = closure_of(optimizer, loss)
    with pytest.raises(RuntimeError, match="second call of the closure"):
        optimizer.step(lambda: closure() if closure.calls == 0 else None)
    assert_same([parameter.grad for parameter in model.parameters()], closure.gradients[0])


@pytest.mark.parametrize("set_to_none", [True, False])
def test_the_mark_of_a_gradient_is_gone(set_to_none):
    """Finding out whether a closure clears gradients leaves nothing behind, also if it raises before it does."""
    model, loss = regression()
    optimizer = unchecked(torch.optim.SGD(model.parameters(), lr=0.0))
    loss().backward()
    before = [parameter.grad.clone() for parameter in model.parameters()]

    def failing():
        raise KeyError

    with pytest.raises(KeyError):
        optimizer.step(failing)
    assert_same([parameter.grad for parameter in model.parameters()], before)

    def closure():
        optimizer.zero_grad(set_to_none=set_to_none)
        loss().backward()

    optimizer.step(closure)
    combined = [parameter.grad.clone() for parameter in model.parameters()]
    optimizer.step(closure)
    assert_same([parameter.grad for parameter in model.parameters()], combined)
    assert float(torch.cat([gradient.flatten() for gradient in combined]).norm()) < 100


class Interrupt(BaseException):
    pass


PACKAGE = str(Path(gradreg_optim.__file__).parent)


class Places(TorchDispatchMode):
    """Notes from which lines of the package each operation is run; raises in place of the operation with that number."""

    def __init__(self, number=None):
        super().__init__()
        self.seen, self.number = [], number

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        frame, lines = sys._getframe(1), []
        while frame is not None and self.number is None:
            if frame.f_code.co_filename.startswith(PACKAGE):
                lines.append((frame.f_code.co_filename, frame.f_lineno))
            frame = frame.f_back
        self.seen.append(tuple(lines))
        if len(self.seen) == self.number:
            raise Interrupt
        return func(*args, **(kwargs or {}))


def stepped(drive, settings, dtype, mode):
    """A step under ``mode``: the weights before and after it, and whether the wrapped optimizer began to step."""
    torch.manual_seed(0)
    model, loss = regression(dtype=dtype)
    base, began = torch.optim.SGD(model.parameters(), lr=0.1), []
    optimizer = GradRegOptimizer(base, strength=0.1, eps=0.1, **settings)
    base.register_step_pre_hook(lambda *_: began.append(True))
    start, was_interrupted = weights(model), False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a low self-check
        try:
            with mode:
                drive(optimizer, loss)
        except Interrupt:
            was_interrupted = True
    return start, weights(model), bool(began), was_interrupted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("drive", "settings"),
    [
        (by_closure, {"check_every": 1}),
        (by_closure, {"method": "central", "check_every": 0}),
        (by_loop, {"check_every": 0}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_an_interrupt_at_any_place_leaves_theta(drive, settings, dtype):
    """θ is whole, bit for bit, wherever an interrupt hits before the wrapped optimizer steps.

    A place is a stack of lines of the package. Its first operation and its last one are tried: those between
    run from the same state of the step.
    """
    found = Places()
    stepped(drive, settings, dtype, found)
    first = {lines: number for number, lines in reversed([*enumerate(found.seen, start=1)])}
    last = {lines: number for number, lines in enumerate(found.seen, start=1)}
    assert len(first) > 15
    tried = 0
    for number in sorted({*first.values(), *last.values()}):
        start, end, has_begun, was_interrupted = stepped(drive, settings, dtype, Places(number))
        assert was_interrupted
        if not has_begun:
            assert_same(end, start)
            tried += 1
    assert tried > 20


def test_an_interrupt_at_any_place_leaves_the_sum_so_far():
    """In the second of two micro-batches: θ and the gradient of the first one are whole, and it can be begun again."""

    def second(number):
        torch.manual_seed(0)
        model, loss = regression(dtype=torch.float32)
        optimizer = unchecked(torch.optim.SGD(model.parameters(), lr=0.1), strength=0.1, eps=0.1)
        past_the_first_step(optimizer)

        def one():
            for _ in optimizer.passes(micro_batches=2):
                closure_of(optimizer, loss)()

        one()
        start, so_far, mode = weights(model), [p.grad.clone() for p in model.parameters()], Places(number)
        try:
            with mode:
                one()
        except Interrupt:
            pass
        assert_same(weights(model), start)
        if optimizer.progress.outcomes:  # the second one was not over
            assert_same([p.grad for p in model.parameters()], so_far)
            one()
        return mode, [p.grad for p in model.parameters()]

    mode, whole = second(None)
    assert len(mode.seen) > 60
    for number in range(1, len(mode.seen) + 1):
        torch.testing.assert_close(second(number)[1], whole, rtol=1e-6, atol=1e-7)
