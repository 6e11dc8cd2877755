"""A step never waits for the device, and launches few kernels. Nothing here needs a device.

Parameters on the meta device stand for a model on a GPU: what would wait for the device raises, and every
operation can be counted, at the size of a real model.
"""

import contextlib
import math

import pytest
import torch
from problems import closure_of, leave_unread, past_the_first_step
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradreg_optim import GradRegOptimizer
from gradreg_optim.core import multi_tensor

FREE = (
    "view",
    "detach",
    "empty",
    "split",
    "slice",
    "select",
    "unbind",
    "alias",
    "profiler",
    "expand",
    "unsqueeze",
    "as_strided",
)


class Device(TorchDispatchMode):
    """Counts launches of kernels, and raises where the host would wait: values read, and copies to or from the host."""

    def __init__(self):
        super().__init__()
        self.launches = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        assert name not in ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero"), f"{name} reads the device"
        out = func(*args, **(kwargs or {}))
        if name in ("copy_", "_to_copy"):
            ends = {x.device.type for x in (args[0], args[1] if name == "copy_" else out)}
            assert len(ends) == 1, f"{name} between {ends}"
        if not any(word in name for word in FREE):
            self.launches += launches_of(args[0]) if name.startswith("_foreach_") else 1
        return out


def launches_of(tensors):
    """Those of torch._foreach_* on CUDA: so many tensors, or blocks of them, go into one."""
    return max(math.ceil(len(tensors) / 36), math.ceil(sum(x.numel() for x in tensors) / 2**16 / 320))


def like_qwen(dtype):
    """The parameters of a transformer of 494 million, which take no memory."""
    hidden, inner, key = 896, 4864, 128
    layer = [(hidden, hidden), (hidden,), (key, hidden), (key,), (key, hidden), (key,), (hidden, hidden)]
    layer += [(inner, hidden), (inner, hidden), (hidden, inner), (hidden,), (hidden,)]
    shapes = [(151936, hidden), *(layer * 24), (hidden,)]
    assert len(shapes) == 290
    return [nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")) for shape in shapes]


def step_on(parameters, dtype=None, **settings):
    """The launches of a step, those of its passes aside; the wrapped optimizer does nothing."""
    optimizer = GradRegOptimizer(torch.optim.SGD(parameters, lr=0.1), **settings)
    optimizer.optimizer.step = lambda: None
    past_the_first_step(optimizer)
    inside = []

    def closure():
        with passes:
            for p in parameters:
                p.grad = torch.empty_like(p)
        inside.append(passes.launches)
        passes.launches = 0

    passes = Device()
    with Device() as mode:
        optimizer.step(closure)
    return mode.launches - sum(inside)


@pytest.fixture(autouse=True)
def _meta_stands_for_a_device(monkeypatch):
    """Parameters on the meta device are refused otherwise."""
    monkeypatch.setattr("gradreg_optim.core.local.refuse_meta", lambda parameters: None)
    monkeypatch.setattr("gradreg_optim.core.local.refuse_refilled", lambda: None)  # all addresses are 0


@pytest.fixture
def _seeded_nowhere(monkeypatch):
    """The meta device has no generator of random numbers."""

    class Generator:
        def __init__(self, device):
            pass

        def manual_seed(self, seed):
            return None

    monkeypatch.setattr(torch, "Generator", Generator)


SETTINGS = [
    {},
    {"radius": 0.1},
    {"eps": 0.1, "g1_clip": None, "g2_clip": None},
    {"max_penalty_ratio": 0.5},
    {"rounding": "nearest"},
    {"method": "central"},
    {"method": "central", "radius": 0.1, "max_penalty_ratio": 0.5},
    {"every": 2},
    {"warmup_steps": 1},
    {"schedule": "linear", "schedule_steps": 3},
    {"shrink": False},
]


@pytest.mark.usefixtures("_seeded_nowhere")
@pytest.mark.parametrize(
    ("settings", "dtype", "driver"),
    [
        *((settings, torch.bfloat16, "closure") for settings in SETTINGS),
        *((settings, torch.float32, "passes") for settings in SETTINGS[:6]),
    ],
    ids=str,
)
def test_nothing_waits(settings, dtype, driver):
    """In steps without a check, whatever is set: also with groups of several kinds, one of them without gradients."""
    first, second, third, unused = (nn.Parameter(torch.empty(3, 5, dtype=dtype, device="meta")) for _ in range(4))
    groups = [
        {"params": [first]},
        {"params": [second], "gradreg_strength": 0.2},
        {"params": [third], "gradreg_strength": 0.0},
    ]
    groups.append({"params": [unused], "gradreg_strength": 0.3})
    optimizer = GradRegOptimizer(torch.optim.SGD(groups, lr=0.1, momentum=0.9), strength=0.1, check_every=0, **settings)
    past_the_first_step(optimizer)  # in which losses are read, and the precision

    def loss():
        return sum((p.float() ** 3).sum() for p in (first, second, third))

    for _ in range(3):
        with Device():
            if driver == "closure":
                optimizer.step(closure_of(optimizer, loss))
            else:
                for _point in optimizer.passes():
                    optimizer.zero_grad()
                    loss().backward()
                optimizer.step()


@pytest.mark.usefixtures("_seeded_nowhere")
@pytest.mark.parametrize("settings", [{}, {"radius": 0.1}, {"rounding": "nearest"}], ids=str)
def test_launches_without_triton(settings):
    """At most 400 for 290 tensors; passes over 494 million elements are what they are made of."""
    assert step_on(like_qwen(torch.bfloat16), check_every=0, **settings) <= 400


@pytest.mark.parametrize(
    ("settings", "bound"),
    [
        ({}, 66),
        ({"eps": 1e-3}, 60),
        ({"radius": 0.1}, 60),
        ({"eps": 1e-3, "max_penalty_ratio": 0.5}, 60),
        ({"eps": 1e-3, "strength": "auto"}, 90),
    ],
    ids=str,
)
def test_launches_with_triton(settings, bound, monkeypatch):
    """At most 60, six more if the radius finds itself, and 30 more in the ten steps that find the strength.

    The five operations are counted as what they launch: a kernel, and what fills and adds its sums.
    """
    leave_unread(monkeypatch)

    class Kernels:
        def __init__(self):
            self.launches = 0
            self.sum = torch.zeros((), device="meta")

        def fit(self, tensors):
            return True

        def _sums(self, launches):
            self.launches += launches
            return self.sum, self.sum

        def norm_squared(self, tensors):
            return self._sums(2)[0]

        def shift_(self, *lists, saved, eps, seed):
            return self._sums(3)

        def moments_(self, *lists, scale):
            return self._sums(2)

        def combine_(self, *lists, weight, clip, is_finite):
            self._sums(1)

        def copy_(self, *lists):
            self._sums(1)

    kernels = Kernels()
    monkeypatch.setattr(multi_tensor, "_kernels_for", lambda tensors: kernels)
    # Zeros stand for sums.
    settings = {"strength": 1e-2, **settings}
    launches = step_on(like_qwen(torch.bfloat16), check_every=0, **settings) + kernels.launches - 9
    assert launches <= bound


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("settings", [{}, {"radius": 0.1, "max_penalty_ratio": 0.5}, {"method": "central"}], ids=str)
def test_nothing_waits_on_cuda(settings, dtype):
    """As torch itself sees it."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1)).to("cuda", dtype)
    optimizer = GradRegOptimizer(torch.optim.AdamW(model.parameters(), fused=True), check_every=0, **settings)
    inputs = torch.randn(8, 16, device="cuda", dtype=dtype)
    closure = closure_of(optimizer, lambda: model(inputs).float().square().mean())
    optimizer.step(closure)  # compiles kernels
    with contextlib.ExitStack() as stack:
        stack.callback(torch.cuda.set_sync_debug_mode, torch.cuda.get_sync_debug_mode())
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(3):
            optimizer.step(closure)
