"""``for _ in optimizer.passes()``: the step of a closure, for loops that have none."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from problems import assert_same, closure_of, regression, twin_of, unchecked, weights
from reference import combined, gradient_of, norm
from torch import nn
from torch.nn.modules import module as nn_module

SETTINGS = {"strength": 0.3, "eps": 0.05}
KINDS = {
    "forward": {},
    "central": {"method": "central"},
    "checked": {"check_every": 1},
    "every third": {"every": 3},
    "after a warm-up": {"warmup_steps": 2},
    "radius": {"eps": None, "radius": 0.05},
    "bounded": {"max_penalty_ratio": 0.01},
}


def noisy_regression():
    """A network with dropout and BatchNorm."""
    return regression(nn.Dropout(0.5), nn.BatchNorm1d(6))


def sgd(model, **settings):
    return unchecked(torch.optim.SGD(model.parameters(), lr=0.1), **{**SETTINGS, **settings})


def run(optimizer, loss, scale=lambda value: value):
    """The documented loop without what follows it; how many passes it was."""
    count = 0
    for _ in optimizer.passes():
        optimizer.zero_grad()
        scale(loss()).backward()
        count += 1
    return count


def gradients(model):
    return [None if p.grad is None else p.grad.detach().clone() for p in model.parameters()]


def outcome(model, optimizer):
    """Everything that a step leaves behind."""
    state = [dict(entry) for entry in optimizer.state.values()]
    metrics = {name: float(value) for name, value in optimizer.metrics.items()}
    return (
        weights(model),
        gradients(model),
        list(model.buffers()),
        copy.deepcopy(state),
        metrics,
        optimizer.step_count,
    )


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_the_loop_is_the_step_of_a_closure(settings):
    """Bit for bit over five steps: weights, gradients, statistics, state, metrics, and the random numbers that follow."""
    model, loss = noisy_regression()
    other, other_loss = twin_of(model, loss)
    found = []
    for current, its_loss, in_loop in ((model, loss, False), (other, other_loss, True)):
        torch.manual_seed(1)
        optimizer = unchecked(torch.optim.AdamW(current.parameters(), lr=0.05), **{**SETTINGS, **settings})
        counts = []
        for _ in range(5):
            closure = closure_of(optimizer, its_loss)
            if in_loop:
                counts.append(run(optimizer, its_loss))
                optimizer.step()
            else:
                optimizer.step(closure)
                counts.append(closure.calls)
            found.append((outcome(current, optimizer), torch.get_rng_state(), counts[-1]))
    assert_same(found[5:], found[:5])
    assert max(counts) > 1


def test_passes_stand_at_their_points():
    """At θ, at θ + ε·g1, and at θ again after the loop and while the wrapped optimizer steps."""
    model, loss = regression()
    start, standing, first = weights(model), [], []
    optimizer = sgd(model)
    for _ in optimizer.passes():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss().backward()
        standing.append(weights(model))
        first = first or gradients(model)
    assert_same(standing, [start, [torch.add(w, g, alpha=0.05) for w, g in zip(start, first, strict=True)]])
    assert_same(weights(model), start)
    assert optimizer.step_count == 0
    optimizer.step()
    assert_same(
        weights(model),
        [torch.add(w, p.grad, alpha=-0.1) for w, p in zip(start, model.parameters(), strict=True)],
    )
    assert optimizer.step_count == 1


def test_clipping_before_the_step_is_that_of_the_combined_gradient():
    """torch.nn.utils.clip_grad_norm_ between loop and step, against the formula by hand."""
    model, loss = regression()
    start = weights(model)
    regularized = combined(gradient_of(list(model.parameters()), loss), **SETTINGS)
    optimizer = sgd(model, g1_clip=None, g2_clip=None)
    run(optimizer, loss)
    length = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    assert float(length) == pytest.approx(norm(regularized), rel=1e-10)
    optimizer.step()
    expected = [w - 0.1 * 0.01 / (length + 1e-6) * g for w, g in zip(start, regularized, strict=True)]
    # g2 − g1 rounds before it is multiplied.
    torch.testing.assert_close(weights(model), expected, rtol=1e-10, atol=1e-14)


def test_the_loop_clears_what_the_last_step_left():
    """Gradients stay after step(), as of any optimizer; zero_grad in the body is all the clearing there has to be."""
    model, loss = regression()
    other, other_loss = twin_of(model, loss)
    optimizer, cleared = sgd(model), sgd(other)
    for _ in range(3):
        run(optimizer, loss)
        optimizer.step()
        assert all(parameter.grad is not None for parameter in model.parameters())
        run(cleared, other_loss)
        cleared.step()
        cleared.zero_grad()
        assert_same(weights(model), weights(other))


def test_a_body_that_never_clears_is_refused():
    """Its first pass would add to the last combined gradient; the weights are whole."""
    model, loss = regression()
    optimizer = sgd(model)

    def uncleared():
        for _ in optimizer.passes():
            loss().backward()
        optimizer.step()

    uncleared()  # there is nothing to clear yet
    before = weights(model)
    with pytest.raises(RuntimeError, match="added to gradients from before"):
        uncleared()
    assert_same(weights(model), before)
    assert optimizer.step_count == 1
    run(optimizer, loss)  # and with clearing it goes on
    optimizer.step()
    assert optimizer.step_count == 2


def test_a_scheduler_sees_the_step():
    """An LR scheduler on the wrapper, stepped after it, does not warn, and its rate counts."""
    model, loss = regression()
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step < 2))
    points = [weights(model)]
    for _ in range(3):
        run(optimizer, loss)
        optimizer.step()
        scheduler.step()
        points.append(weights(model))
    moved = [any((a != b).any() for a, b in zip(*pair, strict=True)) for pair in itertools.pairwise(points)]
    assert moved == [True, True, False]


# Interruptions.

STOPS = [
    ({}, 1),
    ({}, 2),
    ({"method": "central"}, 2),
    ({"method": "central"}, 3),
    ({"check_every": 1}, 2),
    ({"check_every": 1}, 4),
]


def interrupt(optimizer, body, at, way):
    """Leave the loop in pass number ``at``."""
    if way == "dropped":
        passes = optimizer.passes()
        for _ in range(at):
            next(passes)
            body()
        del passes
        return
    for number, _ in enumerate(optimizer.passes(), start=1):
        body()
        if number == at and way == "break":
            break
        if number == at:
            raise KeyError("lost")


@pytest.mark.parametrize(
    ("settings", "at", "way"),
    [*((*stop, "exception") for stop in STOPS), *((*STOPS[1], way) for way in ("break", "dropped"))],
    ids=str,
)
def test_a_loop_that_is_left_gives_back_weights_and_first_gradient(settings, at, way):
    """Bit for bit, g1 as it came although it is clipped; all else as after one pass; no step() but a new loop may follow."""
    model, loss = noisy_regression()
    optimizer = sgd(model, **settings, g1_clip=1e-3)
    before, taken, after = weights(model), [], []

    hooks, backward = len(nn_module._global_forward_pre_hooks), torch.autograd.backward

    def surroundings():
        return [buffer.clone() for buffer in model.buffers()], torch.get_rng_state()

    def body():
        optimizer.zero_grad()
        loss().backward()
        taken.append(gradients(model))
        after.append(surroundings())

    if way == "exception":
        with pytest.raises(KeyError, match="lost"):
            interrupt(optimizer, body, at, way)
    else:
        interrupt(optimizer, body, at, way)
    assert len(taken) == at
    assert_same(weights(model), before)
    assert_same(gradients(model), taken[0])
    assert_same(surroundings(), after[0])
    assert len(nn_module._global_forward_pre_hooks) == hooks
    assert torch.autograd.backward is backward
    with pytest.raises(RuntimeError, match=r"step\(\)"):
        optimizer.step()
    assert_same(weights(model), before)
    assert optimizer.step_count == 0
    run(optimizer, loss)
    optimizer.step()
    assert optimizer.step_count == 1
    assert any((a != b).any() for a, b in zip(weights(model), before, strict=True))


@pytest.mark.parametrize("method", ["forward", "central"])
def test_an_exception_before_backward(method):
    """The first gradient is back although the body has cleared its place."""
    model, loss = regression()
    optimizer = sgd(model, method=method)
    before, taken = weights(model), []

    def loop(stop):
        for number, _ in enumerate(optimizer.passes(), start=1):
            optimizer.zero_grad(set_to_none=False)
            if number == stop:
                raise KeyError("lost")
            loss().backward()
            taken.append(gradients(model))

    for stop in (2, 3)[: 1 + (method == "central")]:
        with pytest.raises(KeyError, match="lost"):
            loop(stop)
        assert_same(gradients(model), taken[0])
        assert_same(weights(model), before)


@pytest.mark.parametrize(("settings", "at"), STOPS[:4], ids=str)
def test_a_step_before_the_passes_end_is_refused(settings, at):
    """From within the body, at any point: the weights are whole, ``.grad`` holds g1, the loop ends."""
    model, loss = regression()
    optimizer = sgd(model, **settings)
    before, taken = weights(model), []

    def loop():
        for number, _ in enumerate(optimizer.passes(), start=1):
            optimizer.zero_grad()
            loss().backward()
            taken.append(gradients(model))
            if number == at:
                optimizer.step()

    with pytest.raises(RuntimeError, match="before the passes of this step ended"):
        loop()
    assert_same(weights(model), before)
    assert_same(gradients(model), taken[0])
    assert optimizer.step_count == 0


def test_a_loop_that_goes_on_after_a_refused_step_has_ended():
    """A body that swallows the error gets no further point, and no step."""
    model, loss = regression()
    optimizer = sgd(model)
    before, count = weights(model), 0
    for _ in optimizer.passes():
        optimizer.zero_grad()
        loss().backward()
        count += 1
        with pytest.raises(RuntimeError, match="before the passes of this step ended"):
            optimizer.step()
    assert count == 1
    with pytest.raises(RuntimeError, match="without a closure"):
        optimizer.step()
    assert_same(weights(model), before)


@pytest.mark.parametrize("by", ["loop", "closure"])
def test_a_second_step_is_refused(by):
    """A combined gradient is good for one step, whoever took it."""
    model, loss = regression()
    optimizer = sgd(model)
    if by == "loop":
        run(optimizer, loss)
        optimizer.step()
    else:
        optimizer.step(closure_of(optimizer, loss))
    before = weights(model)
    with pytest.raises(RuntimeError, match="without a closure"):
        optimizer.step()
    assert_same(weights(model), before)
    assert optimizer.step_count == 1


def test_a_loop_without_a_step_can_be_begun_again():
    """Nothing has moved, nothing was counted: the same passes once more are the same step."""
    model, loss = regression()
    other, other_loss = twin_of(model, loss)
    optimizer, once = sgd(model), sgd(other)
    run(optimizer, loss)
    with pytest.warns(UserWarning, match=r"passes\(\) began again before optimizer.step\(\)"):
        run(optimizer, loss)
    optimizer.step()
    run(once, other_loss)
    once.step()
    assert_same(outcome(model, optimizer), outcome(other, once))


@pytest.mark.parametrize("by", ["loop", "closure"])
def test_another_step_while_a_loop_stands_at_a_point(by):
    """Weights and gradient come back first: it begins at θ, and what it does is not undone."""
    model, loss = regression()
    other, other_loss = twin_of(model, loss)
    optimizer, expected = sgd(model), sgd(other)
    left = optimizer.passes()
    for _ in range(2):
        next(left)
        optimizer.zero_grad()
        loss().backward()
    if by == "loop":
        run(optimizer, loss)
        optimizer.step()
    else:
        optimizer.step(closure_of(optimizer, loss))
    assert list(left) == []
    expected.step(closure_of(expected, other_loss))
    assert_same(outcome(model, optimizer), outcome(other, expected))


def test_pickling_between_loop_and_step():
    """A run can be saved there, as anywhere; so can one whose loop was left."""
    model, loss = regression()
    optimizer = sgd(model)
    for _ in optimizer.passes():
        optimizer.zero_grad()
        loss().backward()
        break
    assert pickle.loads(pickle.dumps(optimizer)).step_count == 0
    run(optimizer, loss)
    assert pickle.loads(pickle.dumps(optimizer)).step_count == 0
    optimizer.step()
    assert pickle.loads(pickle.dumps(optimizer)).step_count == 1


def test_completions_are_reweighted_by_trainers_alone():
    """A body cannot serve it: refused before anything runs."""
    model, _ = regression()
    optimizer = sgd(model, resample="sequence")
    with pytest.raises(RuntimeError, match="resample='sequence'"):
        optimizer.passes()


# Loss scaling.

SCALE = 2.0**10


def scaled(model, **settings):
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    return sgd(model, scaler=scaler, **settings), scaler


@pytest.mark.parametrize("settings", [{}, {"method": "central"}, {"check_every": 1}], ids=str)
def test_the_step_under_a_scaler_is_that_of_a_closure(settings):
    """step() after the loop lets the scaler step the wrapped optimizer; update() is left to the caller."""
    model, loss = noisy_regression()
    other, other_loss = twin_of(model, loss)
    found = []
    for current, its_loss, in_loop in ((model, loss, False), (other, other_loss, True)):
        torch.manual_seed(1)
        optimizer, scaler = scaled(current, **settings)
        for _ in range(3):
            if in_loop:
                run(optimizer, its_loss, scaler.scale)
                optimizer.step()
            else:
                optimizer.step(closure_of(optimizer, its_loss, scaler.scale))
            scaler.update()
            found.append((outcome(current, optimizer), scaler.get_scale()))
    assert_same(found[3:], found[:3])


def test_unscaling_and_clipping_by_the_caller():
    """unscale_, clip_grad_norm_, scaler.step and update as in the manual of torch.amp: the update by hand, in float64."""
    model, loss = regression()
    other, other_loss = twin_of(model, loss)
    optimizer, scaler = scaled(model, g1_clip=None, g2_clip=None)
    parameters = list(other.parameters())
    for step in range(3):
        run(optimizer, loss, scaler.scale)
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        scaler.step(optimizer)
        scaler.update()
        expected = combined(gradient_of(parameters, other_loss), **SETTINGS)
        length = norm(expected)
        assert length > 0.05
        with torch.no_grad():
            for parameter, g in zip(parameters, expected, strict=True):
                parameter -= 0.1 * 0.05 / (length + 1e-6) * g
        # The order of operations.
        torch.testing.assert_close(weights(model), weights(other), rtol=1e-11, atol=1e-13)
        assert optimizer.step_count == step + 1
    assert scaler.get_scale() == SCALE


@pytest.mark.parametrize(("overflow_in", "unscaled"), [(1, False), (2, True), (3, False), (3, True)])
def test_an_overflow_in_any_pass_skips_the_step(overflow_in, unscaled):
    """The weights stay, the scale is halved by update(), the penalty counts as skipped, and the next step goes through."""
    model, loss = regression()
    optimizer, scaler = scaled(model, method="central")
    before = weights(model)

    def step(overflow=0):
        count = 0
        for _ in optimizer.passes():
            optimizer.zero_grad()
            scaler.scale(loss()).backward()
            count += 1
            if count == overflow:
                model[0].weight.grad[0, 0] = math.inf
        if unscaled:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
        else:
            optimizer.step()
        scaler.update()
        return count

    assert step(overflow_in) == (1 if overflow_in == 1 else 3)
    assert_same(weights(model), before)
    assert scaler.get_scale() == SCALE / 2
    assert optimizer.metrics["skipped"] == 1
    assert step() == 3
    assert any((a != b).any() for a, b in zip(weights(model), before, strict=True))
    assert scaler.get_scale() == SCALE / 2
    assert optimizer.metrics["skipped"] == 1
