"""The optimizer against the slow, obvious twin of reference.py, after every step."""

import copy
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from problems import assert_same, closure_of, leave_unread, unchecked
from reference import Reference
from torch import nn

# (γ/ε) times the rounding of g2 − g1; ε is never below 1e-3 here, and steps compound it.
CLOSE = {"rtol": 1e-8, "atol": 1e-9}
# ‖c·g2 − g1‖ of two clipped gradients that are nearly the same: √(rounding of ‖g1‖²), times γ/ε = 100 at
# most.
CANCELLED = 5e-6

BASES = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, weight_decay=0.01),
    # eps: no blown up rounding of tiny gradients.
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.01, eps=1e-3),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, eps=1e-3),
}

SIZES = st.lists(st.integers(0, 3), max_size=3).map(tuple)
GROUP = st.fixed_dictionaries(
    {"shapes": st.lists(SIZES, min_size=1, max_size=3), "excluded": st.integers(0, 3)},
    optional={
        "gradreg_strength": st.sampled_from([0.0, 0.01, 0.3]),
        "step": st.sampled_from([("gradreg_eps", 0.01), ("gradreg_eps", 0.2), ("gradreg_radius", 0.05)]),
    },
)
SETTINGS = st.fixed_dictionaries(
    {"strength": st.sampled_from([0.0, 1e-2, 0.1])},
    optional={
        "length": st.sampled_from([("eps", 1e-3), ("eps", 0.1), ("radius", 0.02), ("radius", 1.0)]),
        "warmup_steps": st.integers(1, 2),
        "schedule": st.sampled_from(["linear", "cosine", lambda step: 1 / (1 + step)]),
        "g1_clip": st.sampled_from([None, 0.5]),
        "g2_clip": st.sampled_from([None, 0.5]),
        "max_penalty_ratio": st.sampled_from([1e-3, 0.1, 5.0]),
    },
)


def factor_of(schedule, warmup_steps, length):
    """The factor on the strength, from its description: named schedules rise over ``length`` steps after the warm-up."""
    if callable(schedule):
        return schedule
    progress = lambda step: min(1.0, (step - warmup_steps + 1) / length)  # noqa: E731
    if schedule == "linear":
        return progress
    if schedule == "cosine":
        return lambda step: (1 - math.cos(math.pi * progress(step))) / 2
    return lambda step: 1.0


def build(descriptions):
    """Parameters, groups and a loss that couples every element to every other."""
    torch.manual_seed(0)
    groups, excluded = [], []
    for description in descriptions:
        parameters = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in description["shapes"]]
        own = {"gradreg_strength": description["gradreg_strength"]} if "gradreg_strength" in description else {}
        own |= dict([description["step"]]) if "step" in description else {}
        groups.append({"params": parameters, **own})
        excluded += parameters[description["excluded"] :]
    everything = [parameter for group in groups for parameter in group["params"]]
    count = sum(parameter.numel() for parameter in everything)
    mixing = torch.randn(5, count, dtype=torch.float64)

    def loss():
        return (mixing @ torch.cat([parameter.flatten() for parameter in everything])).cosh().log().sum()

    return groups, everything, excluded, loss


def named(groups, excluded):
    """The same groups on named parameters, with ``frozen`` in the name of those that are to be left out."""
    number = iter(range(1000))

    def name(parameter):
        return f"{'frozen' if any(parameter is other for other in excluded) else 'layer'}.{next(number)}"

    return [{**group, "params": [(name(parameter), parameter) for parameter in group["params"]]} for group in groups]


# Strength 0.
@pytest.mark.filterwarnings("ignore:Gradient regularization. the first pass left no gradient:UserWarning")
@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
@given(st.lists(GROUP, min_size=1, max_size=3), SETTINGS)
def test_every_step_is_that_of_the_twin(base, descriptions, settings):
    """Over mixed groups and any settings: weights, gradients, state, and metrics agree after each of four steps."""
    settings = dict(settings)
    settings |= dict([settings.pop("length")]) if "length" in settings else {}
    schedule = settings.pop("schedule", None)

    groups, parameters, excluded, loss = build(descriptions)
    assume(len(excluded) < len(parameters))
    patterns = ("frozen",) if excluded else ()
    inner = base(named(copy.copy(groups), excluded))
    optimizer = unchecked(inner, exclude=patterns, schedule=schedule, schedule_steps=3, **settings)

    twin_groups, twin_parameters, twin_excluded, twin_loss = build(descriptions)
    factor = factor_of(schedule, settings.get("warmup_steps", 0), 3)
    twin = Reference(base(twin_groups), excluded=twin_excluded, factor=factor, **settings)

    for _ in range(4):
        closure, twin_closure = closure_of(optimizer, loss), closure_of(twin.optimizer, twin_loss)
        torch.testing.assert_close(optimizer.step(closure), twin.step(twin_closure), **CLOSE)
        assert closure.calls == twin_closure.calls
        for parameter, other in zip(parameters, twin_parameters, strict=True):
            torch.testing.assert_close(parameter, other, **CLOSE)
            torch.testing.assert_close(parameter.grad, other.grad, **CLOSE)
            state, other_state = inner.state[parameter], twin.optimizer.state[other]
            torch.testing.assert_close(list(state.values()), list(other_state.values()), **CLOSE)
        if closure.calls == 2:
            for name, value in twin.metrics.items():
                assert float(optimizer.metrics[name]) == pytest.approx(value, rel=1e-6, abs=CANCELLED), name
        assert optimizer.metrics["skipped"] == twin.skipped == 0


@given(st.integers(0, 1000))
def test_gradients_that_come_and_go(seed):
    """Parameters that only one of the two passes reaches, and non-finite gradients, are handled as the twin does."""

    def problem():
        generator = torch.Generator().manual_seed(seed)
        parameters = [nn.Parameter(torch.randn(2, dtype=torch.float64, generator=generator)) for _ in range(4)]
        present = torch.rand(5, 2, 4, generator=generator) < 0.7
        present[..., 0] = True
        spoiled = torch.rand(5, 2, generator=generator) < 0.2
        return parameters, present, spoiled

    def closure_over(parameters, present, spoiled, optimizer):
        calls = iter(range(2))

        def closure():
            optimizer.zero_grad()
            call = next(calls)
            used = [parameter for parameter, here in zip(parameters, present[call], strict=True) if here]
            loss = torch.stack([(parameter.square() + parameter.prod()).sum() for parameter in used]).sum().square()
            loss.backward()
            if spoiled[call]:
                parameters[0].grad[0] = math.nan
            return loss

        return closure

    parameters, present, spoiled = problem()
    twin_parameters, _, _ = problem()
    optimizer = unchecked(torch.optim.SGD(parameters, lr=1e-3, momentum=0.9), strength=0.1, eps=0.1)
    optimizer._losses.is_integral = False  # the two losses differ on purpose
    twin = Reference(torch.optim.SGD(twin_parameters, lr=1e-3, momentum=0.9), strength=0.1, eps=0.1)
    for step in range(5):
        optimizer.step(closure_over(parameters, present[step], spoiled[step], optimizer))
        twin.step(closure_over(twin_parameters, present[step], spoiled[step], twin.optimizer))
        for parameter, other in zip(parameters, twin_parameters, strict=True):
            assert (parameter.grad is None) == (other.grad is None)
            torch.testing.assert_close(parameter.grad, other.grad, equal_nan=True, **CLOSE)
            torch.testing.assert_close(parameter, other, equal_nan=True, **CLOSE)
        assert optimizer.metrics["skipped"] == twin.skipped
        if spoiled[step][0]:  # the base optimizer saw the NaN: start again from numbers
            for parameter, other in zip(parameters, twin_parameters, strict=True):
                parameter.data.fill_(step + 1.0)
                other.data.fill_(step + 1.0)
            optimizer.state.clear()
            twin.optimizer.state.clear()


def test_complex_parameters_are_pairs_of_reals():
    """A complex parameter takes the step of the real parameter that holds its real and imaginary parts."""
    start = torch.randn(3, 2, dtype=torch.complex128)
    as_complex, as_real = nn.Parameter(start.clone()), nn.Parameter(torch.view_as_real(start).clone())
    mixing = torch.randn(3, 3, dtype=torch.complex128)

    def loss_of(value):
        return lambda: torch.view_as_real(mixing @ value()).square().square().mean()

    complex_loss, real_loss = loss_of(lambda: as_complex), loss_of(lambda: torch.view_as_complex(as_real))
    optimizer = unchecked(torch.optim.AdamW([as_complex], lr=0.1), strength=0.1, radius=0.1, max_penalty_ratio=0.3)
    twin = Reference(torch.optim.AdamW([as_real], lr=0.1), strength=0.1, radius=0.1, max_penalty_ratio=0.3)
    for _ in range(4):
        optimizer.step(closure_of(optimizer, complex_loss))
        twin.step(closure_of(twin.optimizer, real_loss))
        torch.testing.assert_close(torch.view_as_real(as_complex.detach()), as_real.detach(), **CLOSE)
        for name, value in twin.metrics.items():
            assert float(optimizer.metrics[name]) == pytest.approx(value, rel=1e-8)  # sums in another order


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # Rounding of the two gradients, times γ/ε = 2, plus one rounding of the combination.
    [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)],
)
def test_lower_precision_follows_the_twin(dtype, tolerance):
    """In every floating point format the combined gradient is the twin's, to the precision of the format."""
    shapes = [(8, 4), (8,), (1, 8)]
    start = [torch.randn(shape).to(dtype) for shape in shapes]
    inputs = torch.randn(32, 4).to(dtype)

    def problem():
        parameters = [nn.Parameter(value.clone()) for value in start]
        return (
            parameters,
            lambda: (torch.tanh(inputs @ parameters[0].T + parameters[1]) @ parameters[2].T).square().mean(),
        )

    (parameters, loss), (twin_parameters, twin_loss) = problem(), problem()
    # The twin does not shrink. In a network this small a step this long meets changing curvature,
    # which counts as noise.
    optimizer = unchecked(torch.optim.SGD(parameters, lr=0.1), strength=0.5, eps=0.25, shrink=False)
    twin = Reference(torch.optim.SGD(twin_parameters, lr=0.1), strength=0.5, eps=0.25)
    optimizer.step(closure_of(optimizer, loss))
    twin.step(closure_of(twin.optimizer, twin_loss))
    for parameter, other in zip(parameters, twin_parameters, strict=True):
        assert parameter.grad.dtype == dtype
        torch.testing.assert_close(parameter.grad, other.grad, rtol=tolerance, atol=tolerance)


def test_unread_scalars_take_the_same_steps(monkeypatch):
    """The way of devices, where no scalar is ever read, ends where the way of the CPU ends, fallbacks included."""
    descriptions = [
        {"shapes": [(3, 2), ()], "excluded": 1},
        {"shapes": [(2,)], "excluded": 9, "step": ("gradreg_radius", 0.05)},
        {"shapes": [(2,)], "excluded": 0, "step": ("gradreg_radius", 0.05)},
    ]
    results = []
    for unread in (False, True):
        if unread:
            leave_unread(monkeypatch)
        groups, parameters, excluded, loss = build(descriptions)
        optimizer = unchecked(
            torch.optim.SGD(named(groups, excluded), lr=0.05),
            strength=0.1,
            exclude="frozen",
            max_penalty_ratio=0.1,
            g1_clip=1.0,
            g2_clip=1.0,
        )
        for step in range(4):
            closure = closure_of(optimizer, loss)

            def spoiled(closure=closure, step=step, first=parameters[0]):
                value = closure()
                if step == 2 and closure.calls == 2:
                    first.grad[0, 0] = math.inf
                return value

            optimizer.step(spoiled)
        results.append((parameters, {name: float(value) for name, value in optimizer.metrics.items()}))
    (read, metrics), (unread, unread_metrics) = results
    assert metrics["skipped"] == 1
    # Three passes over memory instead of one fused.
    torch.testing.assert_close(read, unread, rtol=1e-12, atol=1e-13)
    assert unread_metrics == pytest.approx(metrics, rel=1e-10)  # the same reason


def test_unread_scalars_are_not_read(monkeypatch):
    """No operation of that way turns a tensor into a number, which is what would stall a device; nor do metrics."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Reads.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    leave_unread(monkeypatch)
    groups, _, _, loss = build([{"shapes": [(3, 2)], "excluded": 9}, {"shapes": [(2,)], "excluded": 9}])
    optimizer = unchecked(torch.optim.SGD(groups, lr=0.05), radius=0.1, max_penalty_ratio=0.1)
    # The first step compares the losses of its passes, the second one sees gradients cleared.
    for _ in range(2):
        optimizer.step(closure_of(optimizer, loss))
    with Reads():
        optimizer.step(closure_of(optimizer, loss))
        metrics = optimizer.metrics
        assert Reads.count == 0
        assert float(metrics["g1_norm"]) > 0
        assert Reads.count == 1  # the figure that was asked for


def test_the_twin_is_bitwise_the_optimizer_where_nothing_is_rounded():
    """On integers the twin and the optimizer are the same, bit for bit: tolerances above are for rounding alone."""
    weight, twin_weight = (nn.Parameter(torch.tensor([3.0, -2.0])) for _ in range(2))
    settings = {"strength": 0.5, "eps": 0.25, "g1_clip": None, "g2_clip": None}
    optimizer = unchecked(torch.optim.SGD([weight], lr=0.5), **settings)
    twin = Reference(torch.optim.SGD([twin_weight], lr=0.5), **settings)
    optimizer.step(closure_of(optimizer, lambda: weight.square().sum()))
    twin.step(closure_of(twin.optimizer, lambda: twin_weight.square().sum()))
    assert_same(weight.detach(), twin_weight.detach())
    assert_same(weight.detach(), torch.tensor([-3.0, 2.0]))  # 3 − 0.5·(6 + 0.5·2·6), −2 − 0.5·(−4 − 0.5·2·4)
