"""What a pass may do on a device: raise, run out of memory, drop out, overflow, be compiled."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from devices import LOW_AND_FULL, PENALTY, every_device, fused, network, on_devices
from problems import assert_same, closure_of, weights
from torch import nn

from gradreg_optim import GradRegOptimizer


class OwnError(Exception):
    pass


def spoiled(device, how):
    if how is OwnError:
        raise OwnError
    torch.empty(2**44, dtype=torch.uint8, device=device)  # memory that no device has


ERRORS = [(error, dtype) for error in (OwnError, torch.OutOfMemoryError) for dtype in LOW_AND_FULL]


@on_devices("error", "dtype", cpu=ERRORS[:2], cuda=ERRORS)  # a CPU that runs out of memory ends the process
def test_interrupted(device, error, dtype):
    """After an error in the second pass θ and g1 are in place, bit for bit, and the next step works."""
    model, loss = network(device, dtype)
    optimizer = fused(model, **PENALTY)
    optimizer.step(closure_of(optimizer, loss))
    before, closure = weights(model), closure_of(optimizer, loss)
    with pytest.raises(error):
        optimizer.step(lambda: spoiled(device, error) if closure.gradients else closure())
    assert_same(weights(model), before)
    assert_same([parameter.grad for parameter in model.parameters()], closure.gradients[0])
    optimizer.step(closure_of(optimizer, loss))
    assert any((a != b).any() for a, b in zip(weights(model), before, strict=True))


class Attending(nn.Module):
    """Attention whose dropout happens inside the kernel."""

    def forward(self, hidden):
        heads = hidden.view(1, 16, 4, 8).transpose(1, 2)
        mixed = nn.functional.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.5)
        return hidden + mixed.transpose(1, 2).reshape(16, 32)


def losses_of_a_step(optimizer, loss):
    """Take one step by ``passes()``; the loss of each pass."""
    losses = []
    for _ in optimizer.passes():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        losses.append(value.detach())
    optimizer.step()
    return losses


@on_devices("dtype", cpu=[(torch.float32,)], cuda=[(dtype,) for dtype in LOW_AND_FULL])
def test_dropout(device, dtype):
    """Both passes draw the same masks, in layers and in fused attention; the next step draws others."""
    model, loss = network(device, dtype, nn.Dropout(0.5), Attending())
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = GradRegOptimizer(still, **{**PENALTY, "strength": 1e-30, "eps": 1e-30})  # θ' = θ
    one, other = (losses_of_a_step(optimizer, loss) for _ in range(2))
    assert_same(one[0], one[1])
    assert_same(other[0], other[1])
    assert not torch.equal(one[0], other[0])


@on_devices("overflows_in", cpu=[(1,), (2,)], cuda=[(1,), (2,)])
def test_scaler_overflow(device, overflows_in):
    """fp16 with a GradScaler: an overflow in either pass skips the step and halves the scale."""
    model, loss = network(device, torch.float32)
    scaler, calls = torch.amp.GradScaler(device, init_scale=2.0**10), []
    optimizer = fused(model, scaler=scaler, **PENALTY)

    def closure():
        optimizer.zero_grad()
        with torch.autocast(device, torch.float16):
            value = loss()
        calls.append(1)
        (scaler.scale(value) * (math.inf if len(calls) == overflows_in else 1)).backward()
        return value

    before = weights(model)
    optimizer.step(closure)
    scaler.update()
    assert_same(weights(model), before)
    assert scaler.get_scale() == 2.0**9
    assert float(optimizer.metrics["skipped"]) == 1
    calls += [1, 1]
    optimizer.step(closure)
    scaler.update()
    assert any((a != b).any() for a, b in zip(weights(model), before, strict=True))


@on_devices("backend", cpu=[("aot_eager",)], cuda=[("inductor",)])
def test_compiled(device, backend):
    """A compiled model takes the steps of the model itself; on a CPU only its graph is captured."""
    ends = []
    for is_compiled in (False, True):
        model, loss = network(device, torch.float32)
        if is_compiled:
            model.compile(backend=backend)
        optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), **PENALTY)
        for _ in range(3):
            optimizer.step(closure_of(optimizer, loss))
        ends.append(weights(model))
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-5)  # fused kernels of float32 add in another order


SETTINGS = {
    "defaults": {},
    "strength=0": {"strength": 0.0},
    "no clips": {"g1_clip": None, "g2_clip": None},
    "clips that engage": {"g1_clip": 1e-3, "g2_clip": 1e-3},
    "radius": {"radius": 0.05},
    "max_penalty_ratio": {"max_penalty_ratio": 0.1},
    "radius, max_penalty_ratio": {"radius": 0.05, "max_penalty_ratio": 0.1},
    "central": {"method": "central"},
    "central, radius": {"method": "central", "radius": 0.05},
    "nearest": {"rounding": "nearest"},
    "nearest, radius": {"rounding": "nearest", "radius": 0.05},
    "shrink, after a check": {"check_every": 100},
    "no shrink": {"check_every": 100, "shrink": False},
    "every=2": {"every": 2},
    "exclude": {"exclude": "bias"},
    "schedule": {"schedule": "cosine", "schedule_steps": 9, "warmup_steps": 1},
}
HALF = (*LOW_AND_FULL, torch.float16)


@contextlib.contextmanager
def waits_are_errors(device):
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@on_devices("name", cpu=[("defaults",)], cuda=[(name,) for name in SETTINGS])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.filterwarnings("ignore:Gradient regularization")  # of a penalty of steps on random data in half precision
def test_no_waits(device, name, dtype):
    """Three steps after the first one, which may check the precision; a wait for the device is an error."""
    model, loss = network(device, dtype)
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-4, eps=1e-3, fused=True)
    optimizer = GradRegOptimizer(adamw, **{"model": model, "check_every": 0, **SETTINGS[name]})
    optimizer.step(closure_of(optimizer, loss))
    with waits_are_errors(device):
        for _ in range(3):
            optimizer.step(closure_of(optimizer, loss))


@every_device
def test_no_waits_with_groups_in_a_loop(device):
    """The same by ``passes()``, with a strength of its own in one group."""
    model, loss = network(device, torch.float32)
    groups = [{"params": model[0].parameters(), "gradreg_strength": 0.5}, {"params": model[2].parameters()}]
    optimizer = GradRegOptimizer(torch.optim.AdamW(groups, lr=1e-4, fused=True), check_every=0)
    losses_of_a_step(optimizer, loss)
    with waits_are_errors(device):
        for _ in range(3):
            losses_of_a_step(optimizer, loss)
