"""The mathematics, on lists of tensors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import assert_same
from torch import nn

from gradreg_optim.core.multi_tensor import (
    add_,
    choose_,
    combine_,
    inner,
    moments_,
    norm_squared,
    restore_,
    save_and_shift_,
    scale_,
    shift_,
    step_moments,
)
from gradreg_optim.core.schemes import clip_coefficient, item_on_cpu, ratio

SHAPES = st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=4)
SEEDS = st.integers(0, 1000)


def random_lists(shapes, seed, count, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes] for _ in range(count)]


@given(SHAPES, SEEDS)
def test_norm_squared_is_that_of_the_concatenation(shapes, seed):
    """A list of tensors of any shapes, empty ones too, has the norm of one long vector."""
    (tensors,) = random_lists(shapes, seed, 1)
    expected = torch.cat([tensor.flatten() for tensor in tensors]).square().sum()
    # Another order of summation.
    torch.testing.assert_close(norm_squared(tensors), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    """The squares of 1000 elements of 300 exceed float16's range, and 1000 steps of bfloat16 would stop adding."""
    total = norm_squared([torch.full((1000,), 300.0, dtype=dtype)])
    assert total.dtype == torch.float32
    # float32 takes a root and squares it again.
    torch.testing.assert_close(total, torch.tensor(9e7), rtol=1e-6, atol=0)


def test_norm_of_mixed_precisions_is_taken_in_the_widest():
    """One float64 tensor makes the sum float64; each tensor's own part is as precise as the tensor."""
    total = norm_squared([torch.full((2,), 3.0), torch.full((1,), 4.0, dtype=torch.float64)])
    # A root, squared again.
    torch.testing.assert_close(total, torch.tensor(34.0, dtype=torch.float64), rtol=1e-7, atol=0)


def test_empty_lists_sum_to_zero():
    """A parameter group without gradients is an ordinary input."""
    assert norm_squared([]) == 0.0
    for pair in (moments_([], []), step_moments([], [], [])):
        assert list(pair) == [0.0, 0.0]
    assert inner([], []) == 0.0


@given(SHAPES, SEEDS)
def test_moments_are_those_of_the_difference(shapes, seed):
    """⟨b − a, a⟩ and ‖b − a‖², and ⟨b − a, x⟩ of a difference that is written, agree with one long vector."""
    a, b, x = random_lists(shapes, seed, 3)
    flat_a, flat_b, flat_x = (torch.cat([t.flatten() for t in tensors]) for tensors in (a, b, x))
    delta = flat_b - flat_a
    close = {"rtol": 1e-12, "atol": 1e-13}  # order of summation
    torch.testing.assert_close(moments_(a, b), (delta @ flat_a, delta @ delta), **close)
    written = [t - s for s, t in zip(a, b, strict=True)]
    torch.testing.assert_close(inner(written, x), delta @ flat_x, **close)
    torch.testing.assert_close(inner(b, b, a), delta @ delta, **close)
    torch.testing.assert_close(step_moments(a, b, x), (delta @ flat_x, flat_x @ flat_x), **close)


def test_moments_do_not_cancel():
    """With g2 one ulp away from g1 the moments are still exact: they come from the difference, not from two norms."""
    g1 = torch.full((100,), 1.0)
    g2 = torch.nextafter(g1, torch.tensor(2.0))
    ulp = 2.0**-23
    assert_same(moments_([g1], [g2])[:2], (torch.tensor(100 * ulp), torch.tensor(100 * ulp**2)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_moments_of_half_precision_are_taken_in_float32(dtype):
    """The difference of two half precision tensors is not rounded to half precision again."""
    a, b = torch.full((3,), 1.0, dtype=dtype), torch.full((3,), 257.0, dtype=torch.float32).to(dtype)
    inner, squares = moments_([a], [b])
    delta = b.float() - 1.0
    assert_same((inner, squares), (delta.sum(), delta.square().sum()))
    assert_same(b, torch.full((3,), 257.0).to(dtype))  # and the input is left as it was


def test_ratio_of_a_vanishing_denominator_is_zero():
    """0/0 and 1/0 are 0: a vanishing gradient has no direction."""
    assert_same(ratio(torch.tensor([0.0, 1.0, 6.0]), torch.tensor([0.0, 0.0, 3.0])), torch.tensor([0.0, 0.0, 2.0]))


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 100.0])
def test_clip_is_that_of_torch(max_norm):
    """The coefficient scales a gradient to the same bits as torch.nn.utils.clip_grad_norm_."""
    parameter = nn.Parameter(torch.zeros(5))
    parameter.grad = torch.randn(5)
    gradient = parameter.grad.clone()
    coefficient = clip_coefficient(gradient.norm(), max_norm)
    nn.utils.clip_grad_norm_([parameter], max_norm)
    assert_same(gradient * coefficient, parameter.grad)


def test_no_bound_is_no_clip():
    """Without a bound the coefficient is 1, also for an infinite norm."""
    assert clip_coefficient(torch.tensor(float("inf")), None).item() == 1.0


def test_numbers_are_read_on_the_cpu_alone():
    """A tensor on a device stays unread, here on the meta device, which could not be read at all."""
    assert item_on_cpu(torch.tensor(0.5)) == 0.5
    assert isinstance(item_on_cpu(torch.tensor(0.5)), float)
    assert item_on_cpu(torch.tensor(False)) is False
    assert item_on_cpu(0.25) == 0.25
    unread = torch.empty((), device="meta")
    assert item_on_cpu(unread) is unread


def test_scaling_by_one_touches_nothing():
    """A known factor of 1 does not even write."""
    x = torch.randn(3)
    version = x._version
    scale_([x], 1.0)
    assert x._version == version
    scale_([x], 2.0)
    assert x._version > version


@pytest.mark.parametrize("as_scalar", [float, torch.tensor], ids=["float", "tensor"])
def test_arithmetic_by_hand(as_scalar):
    """Read or unread scalars: the same results, on numbers that need no rounding."""
    x, w, g2 = torch.tensor([2.0, -4.0]), torch.tensor([1.0, 1.0]), torch.tensor([3.0, 5.0])
    scale_([x], as_scalar(0.5))
    assert_same(x, torch.tensor([1.0, -2.0]))
    shift_([w], [x], eps=as_scalar(0.25))
    assert_same(w, torch.tensor([1.25, 0.5]))
    combine_([x], [g2], weight=as_scalar(4.0))
    assert_same(g2, torch.tensor([9.0, 26.0]))


@given(SHAPES, SEEDS, st.floats(1e-4, 100.0), st.sampled_from([torch.float32, torch.float64]))
def test_unread_scalars_give_the_same_as_read_ones(shapes, seed, value, dtype):
    """The path of devices, whose scalars nobody has read, agrees with the path of the CPU."""
    tight = 8 * torch.finfo(dtype).eps * max(1.0, value)  # fused or separate multiplication and addition
    for function, keyword in ((shift_, "eps"), (combine_, "weight")):
        read, unread, other = (random_lists(shapes, seed, 2, dtype) for _ in range(3))
        first, second = (read[0], read[1]) if function is shift_ else (read[1], read[0])
        function(first, second, **{keyword: value})
        first_unread, second_unread = (unread[0], unread[1]) if function is shift_ else (unread[1], unread[0])
        function(first_unread, second_unread, **{keyword: torch.tensor(value, dtype=dtype)})
        torch.testing.assert_close(read, unread, rtol=tight, atol=tight)
        assert_same(read[1], other[1])  # the direction, or g1, is only read
    read, unread = (random_lists(shapes, seed, 1, dtype)[0] for _ in range(2))
    scale_(read, value)
    scale_(unread, torch.tensor(value, dtype=torch.float64).to(dtype))
    torch.testing.assert_close(read, unread, rtol=tight, atol=0)


@pytest.mark.parametrize("scalar", [0.5, torch.tensor(0.5)], ids=["float", "tensor"])
def test_empty_lists_are_left_alone(scalar):
    """A group without gradients passes through every operation, whether or not its scalars have been read."""
    scale_([], scalar)
    shift_([], [], eps=scalar)
    assert save_and_shift_([], [], eps=scalar)[0] == save_and_shift_([], [], eps=scalar, seed=1)[0] == []
    restore_([], [])
    moments_([], [], scale=scalar)
    combine_([], [], weight=scalar, clip=scalar)
    add_([], [])
    choose_([], [], condition=torch.tensor(True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_shift_rounds_to_the_nearest_weight(dtype):
    """θ + ε·d is computed in float32 and rounded once, to the grid of half precision weights."""
    eps = 2.0**-7  # a value of both dtypes: torch's CPU kernels round ``alpha`` itself to half precision
    w, d = torch.randn(1000).to(dtype), torch.randn(1000).to(dtype)
    expected = (w.float() + eps * d.float()).to(dtype)
    assert (expected != w).any()
    shift_([w], [d], eps=eps)
    assert_same(w, expected)


@given(SHAPES, SEEDS)
def test_combination_has_exact_ends(shapes, seed):
    """Weight 1 leaves g2 and weight 0 leaves g1, bit for bit."""
    g1, g2 = random_lists(shapes, seed, 2, torch.float32)
    for weight, expected in ((1.0, g2), (0.0, g1)):
        combined = [tensor.clone() for tensor in g2]
        combine_(g1, combined, weight=weight)
        assert_same(combined, expected)


def network_gradient(direction=None, eps=0.0):
    """∇L at θ, or at θ + ε·direction, of a small non-quadratic loss in float64, and H·g1 by double backward."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 3), (5,), (1, 5)]
    theta = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    x = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    if direction is not None:
        with torch.no_grad():
            shift_(theta, direction, eps=eps)
    loss = (torch.tanh(x @ theta[0].T + theta[1]) @ theta[2].T).square().mean()
    g1 = torch.autograd.grad(loss, theta, create_graph=True)
    product = torch.autograd.grad(g1, theta, grad_outputs=[g.detach() for g in g1])
    return [g.detach() for g in g1], product


def test_error_falls_in_proportion_to_eps():
    """Against g1 + γ·H·g1 by double backward in float64, the error has slope 1 in ε."""
    strength = 0.1
    g1, product = network_gradient()
    exact = [a + strength * b for a, b in zip(g1, product, strict=True)]
    errors, steps = [], [10.0**-k for k in range(2, 6)]
    for eps in steps:
        g2, _ = network_gradient(g1, eps)
        combine_(g1, g2, weight=strength / eps)
        errors.append(norm_squared([a - b for a, b in zip(g2, exact, strict=True)]).sqrt().log10())
    slopes = torch.stack(errors[:-1]) - torch.stack(errors[1:])
    # 0.03: the next order of the error at the largest ε.
    torch.testing.assert_close(slopes, torch.ones(3, dtype=torch.float64), atol=0.03, rtol=0)
    assert errors[-1] < -4.5


def test_weights_are_saved_before_they_move():
    """Bit for bit as by clone and shift; and where they started, if the way there is interrupted."""
    weights, direction = random_lists([(70,), (5, 7)], 0, 2, torch.float32)
    start, expected = [w.clone() for w in weights], [w.clone() for w in weights]
    saved, _ = save_and_shift_(weights, direction, eps=0.1)
    shift_(expected, direction, eps=0.1)
    assert_same((saved, weights), (start, expected))
    restore_(weights, saved)
    assert_same(weights, start)
    for eps in (0.1, torch.tensor(0.1)):
        with pytest.raises(RuntimeError, match="size"):
            save_and_shift_(weights, [direction[0], torch.zeros(3)], eps=eps)
        assert_same(weights, start)
