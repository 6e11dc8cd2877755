"""The penalty of micro-batches, (γ/2)·(1/n)·Σ‖n·∇ℓ_i‖²: loops over ``passes(micro_batches=n)``."""

import logging
import math
import warnings
from contextlib import suppress

import pytest
import torch
from problems import assert_same, leave_unread, regression, unchecked, weights
from reference import combined, gradient_of, norm
from torch import nn

from gradreg_optim import GradRegOptimizer
from gradreg_optim.core.strength import AIM, STEPS


def parts_of(model, count, dtype=torch.float64):
    """``count`` losses of micro-batches of different sizes, whose sum is the loss of the step."""
    data = [(torch.randn(3 + i, 4, dtype=dtype), torch.randn(3 + i, 2, dtype=dtype)) for i in range(count)]
    return [lambda x=x, y=y: (model(x) - y).square().mean() / count for x, y in data]


def accumulate(optimizer, losses, scale=lambda value: value):
    """The loop over the micro-batches of one step."""
    for loss in losses:
        for _ in optimizer.passes(micro_batches=len(losses)):
            optimizer.zero_grad()
            scale(loss()).backward()


def by_hand(parameters, losses, **settings):
    """Σ_i (1/n)·(combined gradient of n·ℓ_i)."""
    found = [combined(gradient_of(parameters, lambda loss=loss: len(losses) * loss()), **settings) for loss in losses]
    return [sum(tensors) / len(losses) for tensors in zip(*found, strict=True)]


@pytest.mark.parametrize("clips", [{}, {"g1_clip": 0.5, "g2_clip": 0.4}], ids=["no clip", "clips"])
@pytest.mark.parametrize("method", ["forward", "central"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_formula(count, method, clips):
    """Exact in float64; clips, ε and figures are those of n·g_i."""
    model, _ = regression()
    losses = parts_of(model, count)
    settings = {"strength": 0.3, "eps": 1e-2, "method": method, "g1_clip": None, "g2_clip": None, **clips}
    expected = by_hand(list(model.parameters()), losses, **settings)
    optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), **settings)
    start = weights(model)
    accumulate(optimizer, losses)
    assert_same(weights(model), start)
    torch.testing.assert_close([p.grad for p in model.parameters()], expected, rtol=1e-11, atol=1e-13)
    norms = [norm(torch.autograd.grad(count * loss(), list(model.parameters()))) for loss in losses]
    assert float(optimizer.metrics["g1_norm"]) == pytest.approx(sum(norms) / count)
    assert float(optimizer.metrics["loss_check"]) == pytest.approx(1, abs=1e-3)
    optimizer.step()
    assert optimizer.step_count == 1


def test_the_last_step_may_have_fewer():
    """n is that of each step."""
    model, _ = regression()
    optimizer = unchecked(torch.optim.SGD(model.parameters(), lr=0.1), strength=0.3, eps=1e-2, g1_clip=None, g2_clip=None)
    for count in (3, 3, 2):
        losses = parts_of(model, count)
        expected = by_hand(list(model.parameters()), losses, strength=0.3, eps=1e-2)
        accumulate(optimizer, losses)
        torch.testing.assert_close([p.grad for p in model.parameters()], expected, rtol=1e-11, atol=1e-13)
        optimizer.step()


def test_steps_without_penalty_accumulate():
    """In the warm-up and between regularized steps the sum is that of plain accumulation."""
    model, _ = regression()
    optimizer = unchecked(torch.optim.SGD(model.parameters(), lr=0.0), strength=0.3, warmup_steps=1, every=2)
    losses, calls = parts_of(model, 3), []
    plain = torch.autograd.grad(sum(loss() for loss in losses), list(model.parameters()))
    for is_regularized in (False, True, False, True):
        calls.clear()
        accumulate(optimizer, losses, scale=lambda value: calls.append(0) or value)
        assert len(calls) == (6 if is_regularized else 3)
        if not is_regularized:
            torch.testing.assert_close([p.grad for p in model.parameters()], list(plain), rtol=1e-12, atol=1e-14)
        optimizer.step()


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_a_micro_batch_without_gradients(empty):
    """It adds nothing, in whichever place; if all are empty the step says so."""
    model, _ = regression()
    losses = parts_of(model, 3)
    expected = by_hand(list(model.parameters()), losses, strength=0.3, eps=1e-2)
    optimizer = unchecked(torch.optim.SGD(model.parameters(), lr=0.1), strength=0.3, eps=1e-2, g1_clip=None, g2_clip=None)
    for number, loss in enumerate(losses):
        for _ in optimizer.passes(micro_batches=3):
            optimizer.zero_grad()
            if number != empty:
                loss().backward()
    found = [p.grad for p in model.parameters()]
    share = by_hand(list(model.parameters()), [lambda: 3 * losses[empty]()], strength=0.3, eps=1e-2)
    torch.testing.assert_close(found, [a - b / 3 for a, b in zip(expected, share, strict=True)], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("in_pass", [1, 2])
def test_a_micro_batch_that_is_not_finite(in_pass):
    """With a second gradient that is not finite it goes without penalty, and the others keep theirs."""
    model, _ = regression()
    parameters, losses = list(model.parameters()), parts_of(model, 3)
    settings = {"strength": 0.3, "eps": 1e-2}
    expected = by_hand(parameters, losses, **settings)
    whole = by_hand(parameters, [lambda: 3 * losses[1]()], **settings)
    plain = torch.autograd.grad(losses[1](), parameters)
    optimizer = unchecked(torch.optim.SGD(parameters, lr=0.1), g1_clip=None, g2_clip=None, **settings)
    for number, loss in enumerate(losses):
        for count, _ in enumerate(optimizer.passes(micro_batches=3), start=1):
            optimizer.zero_grad()
            loss().backward()
            if number == 1 and count == in_pass:
                parameters[0].grad[0, 0] = math.inf
    if in_pass == 2:
        wanted = [a - b / 3 + c for a, b, c in zip(expected, whole, plain, strict=True)]
        torch.testing.assert_close([p.grad for p in parameters], wanted, rtol=1e-11, atol=1e-13)
    else:
        assert parameters[0].grad[0, 0] == math.inf
        assert all(p.grad.isfinite().all() for p in parameters[1:])
    assert optimizer.metrics["skipped"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("leave", ["raise", "break"])
@pytest.mark.parametrize("in_pass", [1, 2])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_loop_that_is_left_early_can_be_begun_again(number, in_pass, leave):
    """θ and the sum so far are whole, bit for bit, and the step ends as if nothing had happened."""
    model, _ = regression()
    parameters, losses = list(model.parameters()), parts_of(model, 3)
    settings = {"strength": 0.3, "eps": 1e-2, "g1_clip": None, "g2_clip": None}
    expected = by_hand(parameters, losses, strength=0.3, eps=1e-2)
    optimizer = unchecked(torch.optim.SGD(parameters, lr=0.1), **settings)
    start = weights(model)

    def body(loss, stop_in):
        for count, _ in enumerate(optimizer.passes(micro_batches=3), start=1):
            optimizer.zero_grad()
            loss().backward()
            if count == stop_in:
                if leave == "break":
                    break
                raise ZeroDivisionError

    for place, loss in enumerate(losses):
        if place == number:
            before = [None if p.grad is None else p.grad.clone() for p in parameters]
            with suppress(ZeroDivisionError):
                body(loss, in_pass)
            assert_same(weights(model), start)
            if number:
                assert_same([p.grad for p in parameters], before)
        body(loss, None)
    torch.testing.assert_close([p.grad for p in parameters], expected, rtol=1e-11, atol=1e-13)
    optimizer.step()


def test_a_step_needs_all_of_them():
    """Else the update would be that of a part; clearing gradients between two loops begins the step again."""
    model, _ = regression()
    losses = parts_of(model, 3)
    optimizer = unchecked(torch.optim.SGD(model.parameters(), lr=0.1), strength=0.3)

    def one(loss, count):
        for _ in optimizer.passes(micro_batches=count):
            optimizer.zero_grad()
            loss().backward()

    one(losses[0], 3)
    with pytest.raises(RuntimeError, match=r"after 1 of 3 micro-batches.*zero_grad\(\)"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"micro_batches=2 after 1 of 3 micro-batches"):
        one(losses[0], 2)
    optimizer.zero_grad()
    one(losses[0], 2)
    one(losses[1], 2)
    optimizer.step()
    assert optimizer.step_count == 1
    for wrong in (0, -1, 1.5, True, "2"):
        with pytest.raises(ValueError, match=r"micro_batches=.*an integer >= 1"):
            optimizer.passes(micro_batches=wrong)


@pytest.mark.parametrize("change", ["cleared", "clipped"])
def test_a_sum_that_is_touched_between_two_loops(change):
    """It would be lost or wrong unseen."""
    model, _ = regression()
    losses = parts_of(model, 2)
    optimizer = unchecked(torch.optim.SGD(model.parameters(), lr=0.1), strength=0.3)
    for _ in optimizer.passes(micro_batches=2):
        optimizer.zero_grad()
        losses[0]().backward()
    if change == "cleared":
        model.zero_grad()
    else:
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    with pytest.raises(RuntimeError, match=r"changed after 1 of 2 micro-batches.*inside the loop"):
        optimizer.passes(micro_batches=2)


def test_the_norm_of_the_step_refuses_them():
    """The two settings contradict each other."""
    model, _ = regression()
    optimizer = unchecked(torch.optim.SGD(model.parameters(), lr=0.1), strength=0.3, norm_of="step")
    with pytest.raises(ValueError, match=r"micro_batches=2 and norm_of='step'"):
        optimizer.passes(micro_batches=2)
    accumulate(optimizer, parts_of(model, 1))
    optimizer.step()


def test_gradients_of_the_last_step_are_cleared():
    """The first body clears what the last step left; one that clears nothing is refused."""
    model, _ = regression()
    optimizer = unchecked(torch.optim.SGD(model.parameters(), lr=0.0), strength=0.3)
    losses = parts_of(model, 2)
    found = []
    for _ in range(2):
        accumulate(optimizer, losses)
        found.append([p.grad.clone() for p in model.parameters()])
        optimizer.step()
    assert_same(*found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype):
    """The radius adapts over micro-batches, the check is made once a step, and figures are means."""
    model, _ = regression(dtype=dtype)
    losses = parts_of(model, 2, dtype)
    optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=1e-3), strength=0.1, check_every=2)
    passes = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the self-check of a network this small
        for _ in range(3):
            calls = []
            accumulate(optimizer, losses, scale=lambda value, calls=calls: calls.append(0) or value)
            passes.append(len(calls))
            optimizer.step()
    assert passes == [4 + 2, 2 + 2, 4 + 2]
    assert optimizer.param_groups[0]["gradreg_is_low"]
    assert 0 < float(optimizer.metrics["radius"]) < 1


def test_a_scaler_scales_each_pass():
    """The combined gradient carries the scale, and the formula does not see it; an overflow skips the step."""
    model, _ = regression(dtype=torch.float64)
    losses = parts_of(model, 2)
    expected = by_hand(list(model.parameters()), losses, strength=0.3, eps=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    optimizer = unchecked(
        torch.optim.SGD(model.parameters(), lr=0.1), strength=0.3, eps=1e-2, g1_clip=None, g2_clip=None, scaler=scaler
    )
    accumulate(optimizer, losses, scale=scaler.scale)
    torch.testing.assert_close([p.grad / 64 for p in model.parameters()], expected, rtol=1e-11, atol=1e-13)
    start = weights(model)
    optimizer.step()
    scaler.update()
    assert weights(model)[0].ne(start[0]).any()
    accumulate(optimizer, losses, scale=lambda value: scaler.scale(value) * math.inf)
    start = weights(model)
    optimizer.step()
    scaler.update()
    assert_same(weights(model), start)
    assert scaler.get_scale() == 32


# strength="auto".


def ratio_of(parameters, loss, eps):
    """‖Δ‖/(ε·‖g1‖), the length of the penalty for γ = 1."""
    gradient_at = gradient_of(parameters, loss)
    first = gradient_at()
    second = gradient_at(first, eps)
    squares = sum((b - a).square().sum() for a, b in zip(first, second, strict=True))
    return float((squares / sum(a.square().sum() for a in first)).sqrt()) / eps


@pytest.mark.parametrize("read", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_the_strength_settles(count, read, monkeypatch, caplog):
    """γ is AIM over the mean ratio so far, the present one included; after ten steps it is a number that stays."""
    caplog.set_level(logging.WARNING)
    if not read:
        leave_unread(monkeypatch)
    model, _ = regression()
    parameters = list(model.parameters())
    optimizer = unchecked(torch.optim.SGD(parameters, lr=0.05), eps=1e-3, g1_clip=None, g2_clip=None)
    ratios = []
    for step in range(STEPS + 3):
        losses = parts_of(model, count)
        found = []
        for loss in losses:
            if step < STEPS:
                ratios.append(ratio_of(parameters, lambda loss=loss: count * loss(), 1e-3))
            found.append(AIM * len(ratios) / sum(ratios))
        assert (optimizer.param_groups[0]["gradreg_strength"] == "auto") == (step < STEPS)
        accumulate(optimizer, losses)
        assert float(optimizer.metrics["strength"]) == pytest.approx(sum(found) / count, rel=1e-6)
        optimizer.step()
    assert optimizer.param_groups[0]["gradreg_strength"] == pytest.approx(AIM * len(ratios) / sum(ratios), rel=1e-6)
    said = [record.message for record in caplog.records if "strength settled" in record.message]
    assert len(said) == 1
    assert "pass strength=" in said[0]


def test_the_first_penalty_is_as_long_as_the_gradient():
    """In the first step the mean is the ratio itself."""
    model, loss = regression()
    optimizer = unchecked(torch.optim.SGD(model.parameters(), lr=0.05))
    for _ in optimizer.passes():
        optimizer.zero_grad()
        loss().backward()
    assert float(optimizer.metrics["penalty_ratio"]) == pytest.approx(AIM)


def test_resumed_in_the_middle_of_its_steps():
    """To the bit, from a checkpoint of any step."""

    def trained(steps, state=None):
        torch.manual_seed(0)
        model, _ = regression()
        optimizer = GradRegOptimizer(torch.optim.AdamW(model.parameters(), lr=0.05))
        if state is not None:
            model.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
        losses = parts_of(model, 2)
        for _ in range(steps):
            accumulate(optimizer, losses)
            optimizer.step()
        return model.state_dict(), optimizer.state_dict()

    whole = trained(STEPS + 2)
    for done in (4, STEPS, STEPS + 1):
        resumed = trained(STEPS + 2 - done, trained(done))
        assert_same(list(resumed[0].values()), list(whole[0].values()))
        assert resumed[1]["param_groups"] == whole[1]["param_groups"]


def test_groups_with_and_without_a_strength():
    """The ratio is that of the groups that ask for it."""
    model, loss = regression()
    first, second = [*model[0].parameters()], [*model[2].parameters()]
    groups = [{"params": first}, {"params": second, "gradreg_strength": 0.25}]
    optimizer = unchecked(torch.optim.SGD(groups, lr=0.05))
    for _ in range(STEPS):
        optimizer.step(lambda: (optimizer.zero_grad(), loss().backward())[1])
    assert isinstance(optimizer.param_groups[0]["gradreg_strength"], float)
    assert optimizer.param_groups[1]["gradreg_strength"] == 0.25


def test_schedule_and_warm_up_multiply_it():
    """γ is found from the ratio itself, not from its share in a schedule."""
    model, loss = regression()
    optimizer = unchecked(torch.optim.SGD(model.parameters(), lr=0.0), warmup_steps=2, schedule=lambda step: 0.5)
    for _ in range(STEPS + 3):
        optimizer.step(lambda: (optimizer.zero_grad(), loss().backward())[1])
    assert float(optimizer.metrics["penalty_ratio"]) == pytest.approx(AIM / 2)


def test_a_linear_loss_has_no_ratio():
    """Where nothing is curved there is nothing to find: the strength stays 0, and no figure is infinite."""
    w = nn.Parameter(torch.ones(100))
    along = torch.randn(100)
    optimizer = GradRegOptimizer(torch.optim.SGD([w], lr=0.1))
    for _ in range(STEPS + 2):
        optimizer.step(lambda: (optimizer.zero_grad(), (w * along).sum().backward())[1])
    assert optimizer.param_groups[0]["gradreg_strength"] == "auto"
    assert all(math.isfinite(float(value)) for value in optimizer.metrics.values())
