"""fp16 with torch.amp.GradScaler: ``scaler=``, on the CPU."""

import math

import pytest
import torch
from problems import assert_same, closure_of, regression, twin_of, unchecked, weights
from torch import nn

SCALE = 2.0**16
SETTINGS = {"strength": 0.125, "eps": 0.0625, "g1_clip": None, "g2_clip": None}


def scaled(model, base=torch.optim.SGD, enabled=True, **settings):
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, enabled=enabled)
    flags = {"lr": 0.1} if base is torch.optim.SGD else {"lr": 0.1, "fused": True}
    optimizer = unchecked(base(model.parameters(), **flags), scaler=scaler, **{**SETTINGS, **settings})
    return optimizer, scaler


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW], ids=["SGD", "fused AdamW"])
def test_scaling_leaves_no_trace(base):
    """A power of two as scale cancels exactly: the same bits as without a scaler, and the same metrics."""
    model, loss = regression()
    other, other_loss = twin_of(model, loss)
    optimizer, scaler = scaled(model, base)
    plain = unchecked(base(other.parameters(), **optimizer_flags(base)), **SETTINGS)
    for _ in range(4):
        value = optimizer.step(closure_of(optimizer, loss, scaler.scale))
        scaler.update()
        assert_same(value, plain.step(closure_of(plain, other_loss)))  # the unscaled loss
        assert_same(weights(model), weights(other))
        for name, figure in plain.metrics.items():
            # Roots of scaled squares.
            assert float(optimizer.metrics[name]) == pytest.approx(float(figure), rel=1e-14)
    assert scaler.get_scale() == SCALE


def optimizer_flags(base):
    return {"lr": 0.1} if base is torch.optim.SGD else {"lr": 0.1, "fused": True}


@pytest.mark.parametrize(
    "settings",
    [{"g1_clip": 0.05}, {"g2_clip": 0.05}, {"max_penalty_ratio": 0.01}, {"eps": None, "radius": 0.1}],
    ids=["g1_clip", "g2_clip", "max_penalty_ratio", "radius"],
)
def test_every_length_is_that_of_the_unscaled_gradient(settings):
    """Clips, bound and radius mean unscaled gradients."""
    model, loss = regression()
    other, other_loss = twin_of(model, loss)
    optimizer, scaler = scaled(model, **settings)
    plain = unchecked(torch.optim.SGD(other.parameters(), lr=0.1), **{**SETTINGS, **settings})
    for _ in range(3):
        optimizer.step(closure_of(optimizer, loss, scaler.scale))
        scaler.update()
        plain.step(closure_of(plain, other_loss))
    # The root of a scaled sum of squares, in the coefficient.
    torch.testing.assert_close(weights(model), weights(other), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("overflow_in", [1, 2])
def test_an_overflow_in_either_pass_skips_the_step_and_lowers_the_scale(overflow_in):
    """The weights stay, the scale is halved by update(), and the step is counted as skipped."""
    model, loss = regression()
    optimizer, scaler = scaled(model)
    before = weights(model)
    closure = closure_of(optimizer, loss, scaler.scale)

    def overflowing():
        value = closure()
        if closure.calls == overflow_in:
            model[0].weight.grad[0, 0] = math.inf
        return value

    optimizer.step(overflowing)
    scaler.update()
    assert closure.calls == overflow_in
    assert_same(weights(model), before)
    assert scaler.get_scale() == SCALE / 2
    assert optimizer.metrics["skipped"] == 1
    optimizer.step(closure_of(optimizer, loss, scaler.scale))  # and the next one goes through
    scaler.update()
    assert any((a != b).any() for a, b in zip(weights(model), before, strict=True))
    assert scaler.get_scale() == SCALE / 2


@pytest.mark.parametrize(
    "settings",
    [{"g2_clip": 1.0}, {"max_penalty_ratio": 0.5}, {"radius": 0.1, "eps": None}, {"strength": 0.0625}],
)
def test_nothing_hides_an_overflow_of_the_second_pass(settings):
    """Clip, bound, radius, and γ = ε let the overflow of g2 through to the scaler."""
    model, loss = regression()
    optimizer, scaler = scaled(model, **settings)
    before = weights(model)
    closure = closure_of(optimizer, loss, scaler.scale)

    def overflowing():
        value = closure()
        if closure.calls == 2:
            model[0].weight.grad.fill_(-math.inf)
        return value

    optimizer.step(overflowing)
    scaler.update()
    assert_same(weights(model), before)
    assert scaler.get_scale() == SCALE / 2


def test_a_scaler_that_is_off_is_none():
    """``GradScaler(enabled=False)``, as written in scripts that switch precision by a flag."""
    model, loss = regression()
    other, other_loss = twin_of(model, loss)
    optimizer, scaler = scaled(model, enabled=False)
    plain = unchecked(torch.optim.SGD(other.parameters(), lr=0.1), **SETTINGS)
    for spoil in (False, True):
        for current, its_loss, its_model in ((optimizer, loss, model), (plain, other_loss, other)):
            closure = closure_of(current, its_loss, scaler.scale)

            def spoiled(closure=closure, its_model=its_model, spoil=spoil):
                value = closure()
                if spoil and closure.calls == 2:
                    its_model[0].weight.grad[0, 0] = math.inf
                return value

            current.step(spoiled)
        scaler.update()
        assert_same(weights(model), weights(other))
    assert optimizer.metrics["skipped"] == 1


def clipped_steps(optimizer, model, loss, scaler, by, count=3):
    """The documented way to clip: after the loop, unscaled; the step by the optimizer or by the scaler."""
    scales = []
    for _ in range(count):
        for _ in optimizer.passes():
            optimizer.zero_grad()
            scaler.scale(loss()).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step() if by == "optimizer" else scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


@pytest.mark.parametrize("by", ["optimizer", "scaler"])
def test_clipping_after_a_loop_over_passes(by):
    """Unscale, clip, step and update after the loop: the weights of a loop without a scaler, and the clip has engaged."""
    model, loss = regression()
    other, other_loss = twin_of(model, loss)
    optimizer, scaler = scaled(model)
    plain = unchecked(torch.optim.SGD(other.parameters(), lr=0.1), **SETTINGS)
    before = weights(model)
    assert clipped_steps(optimizer, model, loss, scaler, by) == [SCALE] * 3
    clipped_steps(plain, other, other_loss, torch.amp.GradScaler("cpu", enabled=False), "optimizer")
    assert_same(weights(model), weights(other))
    assert optimizer.step_count == 3
    moved = sum(((a - b).square().sum() for a, b in zip(weights(model), before, strict=True)), torch.zeros(())).sqrt()
    assert 0.1 * 0.05 < moved.item() <= 3 * 0.1 * 0.05 * 1.001


@pytest.mark.parametrize("by", ["optimizer", "scaler"])
def test_an_overflow_in_a_loop_with_clipping_skips_the_step(by):
    """What unscale_() finds in the combined gradient keeps the step back, and the scale falls."""
    model, loss = regression()
    optimizer, scaler = scaled(model)
    before = weights(model)
    assert clipped_steps(optimizer, model, lambda: loss() * math.inf, scaler, by, count=1) == [SCALE / 2]
    assert_same(weights(model), before)
    clipped_steps(optimizer, model, loss, scaler, by, count=1)
    assert any((a != b).any() for a, b in zip(weights(model), before, strict=True))


@pytest.mark.parametrize("of", ["wrapper", "base"])
@pytest.mark.parametrize("how", ["closure", "loop"])
def test_unscaling_within_a_pass_names_the_way_that_works(how, of):
    """Before a second gradient with another scale is taken; the weights stay."""
    model, loss = regression()
    optimizer, scaler = scaled(model)
    before = weights(model)
    closure = closure_of(optimizer, loss, scaler.scale)

    def unscaling():
        closure()
        scaler.unscale_(optimizer if of == "wrapper" else optimizer.optimizer)

    def run():
        if how == "closure":
            optimizer.step(unscaling)
        else:
            for _ in optimizer.passes():
                unscaling()

    with pytest.raises(RuntimeError, match=r"unscale_\(optimizer\) was called within a pass.*after the loop call"):
        run()
    assert closure.calls == 1
    assert_same(weights(model), before)


def test_a_forgotten_update_is_the_scalers_error():
    """Without scaler.update() the scaler says so in the next step; nothing is said about passes."""
    model, loss = regression()
    optimizer, scaler = scaled(model)
    optimizer.step(closure_of(optimizer, loss, scaler.scale))
    with pytest.raises(RuntimeError, match=r"since the last update\(\)"):
        optimizer.step(closure_of(optimizer, loss, scaler.scale))


def test_a_scaler_that_the_optimizer_was_not_given():
    """Its scaled gradients were taken for gradients: refused where it steps, and not if it is off."""
    for enabled in (True, False):
        model, loss = regression()
        before = weights(model)
        optimizer = unchecked(torch.optim.SGD(model.parameters(), lr=0.1), **SETTINGS)
        torch.optim.lr_scheduler.StepLR(optimizer, 10)  # which puts a frame of its own between the two
        scaler = torch.amp.GradScaler("cpu", enabled=enabled)
        for _ in optimizer.passes():
            closure_of(optimizer, loss, scaler.scale)()
        if enabled:
            with pytest.raises(RuntimeError, match="does not know this scaler"):
                scaler.step(optimizer)
            assert_same(weights(model), before)
        else:
            scaler.step(optimizer)
            assert optimizer.step_count == 1


def test_without_penalty_the_scaler_steps_too():
    """During the warm-up the step is the scaler's on the base optimizer, bit for bit."""
    model, loss = regression()
    other, other_loss = twin_of(model, loss)
    optimizer, scaler = scaled(model, warmup_steps=3)
    bare, bare_scaler = (
        torch.optim.SGD(other.parameters(), lr=0.1),
        torch.amp.GradScaler("cpu", init_scale=SCALE),
    )
    for _ in range(2):
        optimizer.step(closure_of(optimizer, loss, scaler.scale))
        scaler.update()
        closure_of(bare, other_loss, bare_scaler.scale)()
        bare_scaler.step(bare)
        bare_scaler.update()
    assert_same(weights(model), weights(other))


def test_autocast_to_half_precision():
    """The documented use: autocast forward, scaled loss, one update() a step; the loss falls and nothing is skipped."""
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
    inputs, targets = torch.randn(64, 4), torch.randn(64, 1)
    optimizer, scaler = scaled(model, eps=0.01)

    def closure():
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = nn.functional.mse_loss(model(inputs).float(), targets)
        scaler.scale(loss).backward()
        return loss.detach()

    losses = []
    for _ in range(40):
        losses.append(optimizer.step(closure).item())
        scaler.update()
    assert losses[-1] < 0.9 * losses[0]
    assert optimizer.metrics["skipped"] == 0


class ClosureScaler(torch.amp.GradScaler):
    """The protocol of Composer 0.32: the scaler's closure clears, unscales, and returns ``None`` after an overflow."""

    def step(self, optimizer, *, closure):
        def unscaling():
            state = self._per_optimizer_states[id(optimizer)]
            state["stage"] = torch.amp.grad_scaler.OptState.READY
            optimizer.zero_grad()
            value = closure()
            self.unscale_(optimizer)
            return None if any(found.item() for found in state["found_inf_per_device"].values()) else value

        return optimizer.step(closure=unscaling)


@pytest.mark.parametrize("in_pass", [None, 0, 1])
def test_a_scaler_that_unscales_in_the_closure(in_pass):
    """Both gradients come unscaled: the bits of a step without scaler. An overflow in either pass skips the step."""
    model, loss = regression()
    other, other_loss = twin_of(model, loss)
    optimizer = unchecked(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), **SETTINGS)
    plain = unchecked(torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9), **SETTINGS)
    scaler, calls = ClosureScaler("cpu", init_scale=SCALE), []
    assert optimizer._step_supports_amp_closure  # Composer asks for it under this name

    def closure():
        value = loss()
        calls.append(math.inf if len(calls) == failing else 1.0)
        scaler.scale(value * calls[-1]).backward()
        return value

    for number in range(4):
        failing, before = (in_pass if number == 2 else None), weights(model)
        calls.clear()
        scaler.step(optimizer, closure=closure)
        scaler.update()
        if failing is None:
            plain.step(closure_of(plain, other_loss))
            assert_same(weights(model), weights(other))
        else:
            assert len(calls) == failing + 1
            assert_same(weights(model), before)
    assert scaler.get_scale() == SCALE * (1.0 if in_pass is None else 0.5)
    assert optimizer.step_count == 4
    assert float(optimizer.metrics["skipped"]) == (in_pass is not None)
