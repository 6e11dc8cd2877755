"""Checks of gpu.py: what passes may do (raise, drop out, overflow, be compiled), and that no step waits for the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cost.gpu_checks import Skip, expect
from benchmarks.cost.gpu_problems import (
    LOW_AND_FULL,
    PENALTY,
    assert_same,
    closure_of,
    copies,
    fused,
    losses_of_a_step,
    network,
)
from gradreg_optim import GradRegOptimizer, MicroBatches


def interrupted(device: torch.device, error: type[BaseException], spoil: Callable[[], Any]) -> None:
    """After ``spoil`` has raised in the second pass, θ and g1 are in place bit for bit, and the next step works."""
    for dtype in LOW_AND_FULL:
        model, loss = network(device, dtype)
        optimizer = fused(model, **PENALTY)
        optimizer.step(closure_of(optimizer, loss))
        before, closure = copies(model), closure_of(optimizer, loss)

        def failing(closure: Any = closure) -> Tensor:
            return spoil() if closure.gradients else closure()

        try:
            optimizer.step(failing)
        except error:
            pass
        else:
            raise AssertionError(f"no {error.__name__} came out of the step")
        assert_same(copies(model), before)
        assert_same([parameter.grad for parameter in model.parameters()], closure.gradients[0])
        optimizer.step(closure_of(optimizer, loss))
        expect(any((a != b).any() for a, b in zip(copies(model), before, strict=True)), "the next step moved nothing")


def after_an_error(device: torch.device) -> str:
    """An exception of the loss."""

    def spoil() -> None:
        raise ZeroDivisionError

    interrupted(device, ZeroDivisionError, spoil)
    return "same bits"


def out_of_memory(device: torch.device) -> str:
    """The device's own error, for memory that no device has."""
    if device.type != "cuda":
        raise Skip("only a GPU runs out of memory without ending the process")
    interrupted(device, torch.OutOfMemoryError, lambda: torch.empty(2**44, dtype=torch.uint8, device=device))
    return "same bits"


class Attending(nn.Module):
    """Attention whose dropout happens inside the kernel."""

    def forward(self, hidden: Tensor) -> Tensor:
        heads = hidden.view(1, 16, 4, 8).transpose(1, 2)
        mixed = nn.functional.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.5)
        return hidden + mixed.transpose(1, 2).reshape(16, 32)


def dropout(device: torch.device) -> str:
    """Both passes draw the same masks, in layers and in fused attention; the next step draws others."""
    for dtype in LOW_AND_FULL:
        model, loss = network(device, dtype, nn.Dropout(0.5), Attending())
        still = torch.optim.SGD(model.parameters(), lr=0.0)
        optimizer = GradRegOptimizer(still, **{**PENALTY, "strength": 1e-30, "eps": 1e-30})  # θ' = θ
        values = [[value.detach() for value in losses_of_a_step(optimizer, loss)] for _ in range(2)]
        assert_same(values[0][0], values[0][1])
        assert_same(values[1][0], values[1][1])
        expect(not torch.equal(values[0][0], values[1][0]), "two steps drew the same masks")
    return "same masks"


def scaler_overflow(device: torch.device) -> str:
    """fp16 with a GradScaler: an overflow in either pass skips the step and halves the scale; then it goes on."""
    model, loss = network(device, torch.float32)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
    optimizer = fused(model, scaler=scaler, **PENALTY)
    for overflows_in in (1, 2):
        before, scale, calls = copies(model), scaler.get_scale(), []

        def closure(overflows_in: int = overflows_in, calls: list[int] = calls) -> Tensor:
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.float16):
                value = loss()
            calls.append(1)
            (scaler.scale(value) * (math.inf if len(calls) == overflows_in else 1)).backward()
            return value

        optimizer.step(closure)
        scaler.update()
        assert_same(copies(model), before)
        expect(scaler.get_scale() == scale / 2, f"after an overflow the scale went from {scale} to {scaler.get_scale()}")
        calls += [1, 1]
        optimizer.step(closure)
        scaler.update()
        expect(any((a != b).any() for a, b in zip(copies(model), before, strict=True)), "the next step moved nothing")
    expect(float(optimizer.metrics["skipped"]) == 2, f"{float(optimizer.metrics['skipped'])} steps were skipped, not 2")
    return "both passes"


def compiled(device: torch.device) -> str:
    """A model compiled by Inductor takes the steps of the model itself; on a CPU only its graph is captured."""
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    model, loss = network(device, torch.float32)
    other, other_loss = network(device, torch.float32)
    other.compile(backend=backend)
    for current, its_loss in ((model, loss), (other, other_loss)):
        optimizer = GradRegOptimizer(torch.optim.SGD(current.parameters(), lr=0.1), **PENALTY)
        for _ in range(3):
            optimizer.step(closure_of(optimizer, its_loss))
    # fp32: fused kernels add in another order.
    torch.testing.assert_close(copies(other), copies(model), rtol=1e-5, atol=1e-5)
    return backend


# Waits.

SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "strength=0": {"strength": 0.0},
    "no clips": {"g1_clip": None, "g2_clip": None},
    "clips that engage": {"g1_clip": 1e-3, "g2_clip": 1e-3},
    "radius": {"radius": 0.05},
    "max_penalty_ratio": {"max_penalty_ratio": 0.1},
    "radius, max_penalty_ratio": {"radius": 0.05, "max_penalty_ratio": 0.1},
    "central": {"method": "central"},
    "central, radius": {"method": "central", "radius": 0.05},
    "exact": {"method": "exact"},
    'rounding="nearest"': {"rounding": "nearest"},
    "rounding=nearest, radius": {"rounding": "nearest", "radius": 0.05},
    "shrink, after a check": {"check_every": 100},
    "no shrink": {"check_every": 100, "shrink": False},
    "every=2": {"every": 2},
    "fraction=1/2": {"fraction": 0.5},
    "fraction=1/2, central, radius": {"fraction": 0.5, "method": "central", "radius": 0.05},
    "exclude": {"exclude": "bias"},
    "schedule": {"schedule": "cosine", "schedule_steps": 9, "warmup_steps": 1},
    "gradreg_strength of a group": {"groups": True},
    "passes()": {"loop": True},
}


@contextmanager
def waits_are_errors(device: torch.device) -> Iterator[None]:
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def no_waits(device: torch.device) -> str:
    """Three steps of every setting after the first one, which may check the precision; a wait is an error."""
    waiting = {}
    for dtype in (*LOW_AND_FULL, torch.float16):
        for name, settings in SETTINGS.items():
            step = step_of(dict(settings), *network(device, dtype))
            step()
            try:
                with waits_are_errors(device):
                    [step() for _ in range(3)]
            except RuntimeError as error:
                waiting[f"{name}, {dtype}".replace("torch.", "")] = str(error).splitlines()[0]
    expect(not waiting, f"these wait for the device: {waiting}")
    if device.type != "cuda":
        raise Skip(f"{len(SETTINGS)} settings ran; waits are noticed on a GPU alone")
    return f"{len(SETTINGS)} settings, 3 dtypes"


def step_of(settings: dict[str, Any], model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], Any]:
    """One step of a fused AdamW with ``settings``."""
    loops, has_groups = settings.pop("loop", False), settings.pop("groups", False)
    groups: list[dict[str, Any]] = [{"params": list(model.parameters())}]
    if has_groups:
        groups = [{"params": model[0].parameters(), "gradreg_strength": 0.5}, {"params": model[2].parameters()}]
    base = torch.optim.AdamW(groups, lr=1e-4, eps=1e-3, fused=True)
    optimizer = GradRegOptimizer(base, **{"model": model, "check_every": 0, **settings})
    if loops:
        return lambda: list(losses_of_a_step(optimizer, loss))

    def backward(part: int) -> Tensor:
        value = loss() / 2
        value.backward()
        return value.detach()

    if "fraction" in settings:
        return lambda: optimizer.step(MicroBatches(backward, range(2)))
    return lambda: optimizer.step(closure_of(optimizer, loss))
