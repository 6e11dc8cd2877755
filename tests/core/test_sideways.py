"""The noise floor, of a step as long as the real one that leads nowhere; and what no difference at all means."""

import warnings

import pytest
import torch
from problems import assert_same, closure_of
from torch import nn

from gradreg_optim import GradRegOptimizer
from gradreg_optim.core import multi_tensor
from gradreg_optim.core.precision import too_short

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def moved(start, direction, drawn, **settings):
    """Where ``start`` is after a step of length 1 sideways."""
    there = [x.clone() for x in start]
    saved, _ = multi_tensor.save_and_shift_(there, direction, eps=1.0, signs=drawn, **settings)
    assert_same(saved, start)
    return there


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_element_moves_as_far_as_ahead(dtype, monkeypatch):
    """With either sign half of the time, in pieces and layouts of all kinds; other steps draw other signs."""
    monkeypatch.setattr(multi_tensor, "SIGNED", 1000)
    start = [
        torch.zeros(50, 70, dtype=dtype),
        torch.zeros(70, 50, dtype=dtype).t(),
        torch.zeros(0, dtype=dtype),
    ]
    direction = [torch.rand(50, 70).to(dtype), torch.rand(70, 50).to(dtype).t(), torch.zeros(0, dtype=dtype)]
    there = moved(start, direction, 3 << 40)
    assert_same([x.abs().flatten().sort().values for x in there], [x.flatten().sort().values for x in direction])
    assert all(float((x.abs() == y).float().mean()) < 0.2 for x, y in zip(there[:2], direction, strict=False))
    assert_same(moved(start, direction, 3 << 40), there)
    drawn = [*torch.cat([x.reshape(-1) for x in there])[:7000].sign().split(1000)]
    drawn += [x.reshape(-1)[:1000].sign() for x in moved(start, direction, 4 << 40)[:2]]
    for number, left in enumerate(drawn):  # 1000 signs: five standard deviations
        assert abs(float(left.float().mean())) < 0.16
        assert all(abs(float((left * right).float().mean())) < 0.16 for right in drawn[:number])


def test_signs_do_not_depend_on_other_tensors():
    """Replicas between shards of other sizes draw alike on all ranks."""
    shared = torch.rand(40)
    here, there = (moved([torch.zeros(n), torch.zeros(40)], [torch.rand(n), shared], 5)[1] for n in (7, 700))
    assert_same(here, there)


def test_stochastic_rounding_sideways():
    """Steps far below half a spacing arrive, on average, as those ahead do."""
    start, direction = [torch.ones(20_000).bfloat16()], [torch.full((20_000,), 0.1 * 2**-8).bfloat16()]
    nearest, stochastic = moved(start, direction, 1)[0], moved(start, direction, 1, seed=1)[0]
    assert_same(nearest, start[0])
    steps = (stochastic.float() - 1).abs()
    assert float(steps.mean()) == pytest.approx(0.1 * 2**-8, rel=0.1)


def test_masters_of_another_dtype():
    """As ZeRO writes: the start is in float32 and stays."""
    masters, direction, written = torch.rand(100), torch.full((100,), 0.7), torch.zeros(100).bfloat16()
    before = masters.clone()
    multi_tensor.shift_([written], [direction], eps=0.5, start=[masters], signs=1)
    assert_same(masters, before)
    ways = torch.stack([(masters + 0.5 * direction).bfloat16(), (masters - 0.5 * direction).bfloat16()])
    assert bool((written == ways).any(0).all())
    assert not any(torch.equal(written, way) for way in ways)


def test_weights_are_whole_if_a_step_sideways_is_interrupted(monkeypatch):
    """In the middle of a list: those that have moved come back."""
    weights, calls = [torch.ones(5), torch.ones(6)], []
    shift = multi_tensor._shift_

    def interrupted(*args, **kwargs):
        shift(*args, **kwargs)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(multi_tensor, "_shift_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        multi_tensor.save_and_shift_(weights, [torch.ones(5), torch.ones(6)], eps=1.0, signs=0)
    assert_same(weights, [torch.ones(5), torch.ones(6)])


def under_autocast(eps, *, is_exact=True, **settings):
    """One step without update of a network whose passes compute in bfloat16, and whose weights are values of it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    x, y = torch.randn(64, 32), torch.randn(64, 1)
    with torch.no_grad():
        for parameter in model.parameters() if is_exact else []:
            parameter.copy_(parameter.bfloat16())
    optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), eps=eps, **settings)

    def loss():
        with torch.autocast("cpu", torch.bfloat16):
            return (model(x).float() - y).square().mean()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step(closure_of(optimizer, loss))
    return {name: float(value) for name, value in optimizer.metrics.items()}, [str(warning.message) for warning in caught]


def test_the_floor_of_a_short_step_under_autocast():
    """Where the difference is noise, the floor is about as large, there is little signal, and a longer step is advised."""
    metrics, [message] = under_autocast(1e-3, is_exact=False, check_every=1)
    assert metrics["self_check"] < 0.3
    assert metrics["signal"] < 0.5
    assert "a longer step helps" in message
    metrics, messages = under_autocast(3e-2, is_exact=False, check_every=1)
    assert metrics["self_check"] > 0.9
    assert metrics["signal"] > 0.9
    assert not messages


@pytest.mark.parametrize("settings", [{}, {"check_every": 1}], ids=["by default", "when asked"])
def test_a_step_that_the_passes_do_not_see(settings):
    """All of it arrives in the weights, and next to nothing where these are cast: that is told."""
    for eps, share in ((1e-5, "equal to the last bit"), (1e-4, "the share 0.0")):
        metrics, [message] = under_autocast(eps, **settings)
        assert metrics["perturbation_fidelity"] > 0.99
        assert metrics["self_check"] < 0.5
        assert metrics["signal"] < 0.2
        assert share in message
        assert "a longer step helps (set radius=0.005)" in message


def test_advice_is_followed_by_a_floor():
    """Once a step arrives: a step that was swallowed leaves none, so that the next one is checked."""
    weight = nn.Parameter(torch.full((16, 16), 0.5))
    optimizer = GradRegOptimizer(torch.optim.SGD([weight], lr=0.0), eps=1e-5)

    def loss():
        with torch.autocast("cpu", torch.bfloat16):
            return (weight @ weight @ weight).float().square().mean()

    closure = closure_of(optimizer, loss)
    with pytest.warns(UserWarning, match="equal to the last bit"):
        optimizer.step(closure)
    for group in optimizer.param_groups:
        group["gradreg_eps"], group["gradreg_radius"] = None, 0.5
    optimizer.step(closure)
    assert optimizer.metrics["noise_floor"] > 0
    assert optimizer.metrics["self_check"] > 0.9


@pytest.mark.parametrize("method", ["forward", "central"])
@pytest.mark.parametrize("is_low", [True, False])
def test_the_length_of_the_step_sideways(is_low, method):
    """That of the real one where passes round to few bits; elsewhere a hundredth, ahead, which arrives as well."""
    weight, points = nn.Parameter(torch.rand(30, 40)), []
    optimizer = GradRegOptimizer(torch.optim.SGD([weight], lr=0.0), radius=0.5, check_every=1, method=method)

    def loss():
        points.append(weight.detach().clone())
        with torch.autocast("cpu", torch.bfloat16, enabled=is_low):
            return (weight @ weight.T).float().square().mean()

    optimizer.step(closure_of(optimizer, loss))
    theta, aside, behind, ahead = points[:4]
    assert float((ahead - theta).norm()) == pytest.approx(0.5, rel=1e-4)
    near = {"rtol": 0, "atol": 1e-6}  # θ' is rounded
    if not is_low:
        torch.testing.assert_close(aside - theta, 0.01 * (ahead - theta), **near)
        return
    torch.testing.assert_close(*((x - theta).abs().flatten().sort().values for x in (aside, ahead)), **near)
    cosine = torch.cosine_similarity((aside - theta).flatten(), (ahead - behind).flatten(), dim=0)
    assert abs(float(cosine)) < 0.15  # five standard deviations


@pytest.mark.parametrize("method", ["forward", "central"])
def test_curvature_in_every_direction_is_no_noise(method):
    """Of a loss whose parameters have nothing to do with each other, all directions are as curved as g1."""
    weight = nn.Parameter(torch.rand(100, dtype=torch.float64))
    optimizer = GradRegOptimizer(torch.optim.SGD([weight], lr=0.0), eps=1e-2, check_every=1, method=method)
    optimizer.step(closure_of(optimizer, lambda: torch.exp(weight).sum()))
    assert float(optimizer.metrics["signal"]) > 0.999
    assert optimizer.metrics["self_check"] > 0.99


@pytest.mark.parametrize("method", ["forward", "central"])
def test_no_difference_is_no_curvature(method):
    """A step that is rounded away in both directions: told, with the setting, and no self-check of 1."""
    weight = nn.Parameter(torch.rand(100).add(1).bfloat16())
    settings = {"eps": 1e-6, "check_every": 1, "rounding": "nearest", "method": method}
    optimizer = GradRegOptimizer(torch.optim.SGD([weight], lr=0.0), **settings)
    with pytest.warns(UserWarning, match=r"equal to the last bit.* a longer step helps \(set radius=0\.005\)"):
        optimizer.step(closure_of(optimizer, lambda: weight.float().square().sum()))
    assert optimizer.metrics["self_check"] == 0.0
    assert float(optimizer.metrics["signal"]) == 0.0
    assert optimizer.param_groups[0]["gradreg_floor"] is None
    assert "radius=0.2" in too_short("", 1e-3, 0.02)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_linear_loss_is_no_trouble(dtype):
    """The step arrives and there is no curvature: nobody is warned, and there is nothing that a check has found good."""
    weight = nn.Parameter(torch.rand(100).to(dtype))
    optimizer = GradRegOptimizer(torch.optim.SGD([weight], lr=0.0), radius=0.5, check_every=1)
    optimizer.step(closure_of(optimizer, lambda: weight.sum()))
    assert optimizer.metrics["self_check"] == 0.0
    assert float(optimizer.metrics["signal"]) == 0.0


def test_a_gradient_of_zero_tells_nothing():
    """There is no step to check: the next gradient is checked in its place."""
    weight, factor = nn.Parameter(torch.rand(10, dtype=torch.float64)), torch.zeros(())
    optimizer = GradRegOptimizer(torch.optim.SGD([weight], lr=0.0), check_every=10)
    closure = closure_of(optimizer, lambda: factor * weight.square().sum())
    optimizer.step(closure)
    assert "self_check" not in optimizer.metrics
    factor.fill_(1.0)
    optimizer.step(closure)
    assert optimizer.metrics["self_check"] == pytest.approx(1.0, abs=1e-6)
