"""The Triton back end against the one in torch alone, on a CPU: Triton's interpreter runs its kernels here."""

import math
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import assert_same, closure_of, past_the_first_step, regression, unchecked, weights
from torch import nn

from gradreg_optim.core import multi_tensor
from gradreg_optim.core.multi_tensor import back_end

pytest.importorskip("triton", reason="triton, which torch brings along for CUDA and ROCm, has no package for this platform")

BLOCK = 64
HALVES = [torch.bfloat16, torch.float16]
DTYPES = st.sampled_from([*HALVES, torch.float32])
SIZES = st.lists(st.sampled_from([0, 1, 3, 16, 63, 64, 65, 128, 200]), min_size=1, max_size=4)
SEEDS = st.integers(0, 1000)


@pytest.fixture(scope="module")
def kernels():
    """The back end, interpreted, with blocks so small that tensors have several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # read when the kernels are defined
        from gradreg_optim.core.multi_tensor import triton_kernels

        patch.setattr(triton_kernels, "BLOCK", BLOCK)
        yield triton_kernels


@pytest.fixture
def interpreted(kernels, monkeypatch):
    """Every operation on CPU tensors goes through the kernels; the names of the kernels launched so far."""
    launched = []
    launch = kernels._Launch.__call__

    def noted(self, kernel, *arguments, **constants):
        launched.append(kernel.fn.__name__)
        launch(self, kernel, *arguments, **constants)

    monkeypatch.setattr(kernels._Launch, "__call__", noted)
    monkeypatch.setattr(multi_tensor, "IS_INTERPRETED", True)
    return launched


def random_lists(sizes, seed, *dtypes, offset=0):
    """A list of tensors a dtype; with an offset they are views that begin at odd addresses."""
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(size + offset, generator=generator).to(dtype)[offset:] for size in sizes] for dtype in dtypes]


def copies(*lists):
    return [[x.clone() for x in xs] for xs in lists]


def assert_near(actual, expected, dtype):
    """Within two roundings of ``dtype``."""
    torch.testing.assert_close(actual, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@given(SIZES, SEEDS, DTYPES, DTYPES, st.sampled_from([0, 1]))
def test_sums(kernels, sizes, seed, first, second, offset):
    """Norm and moments, of any sizes and dtypes, empty and unaligned tensors among them; g1 is scaled on the way."""
    g1, g2 = random_lists(sizes, seed, first, second, offset=offset)
    close = {"rtol": 1e-5, "atol": 1e-4}  # the order of summation
    torch.testing.assert_close(kernels.norm_squared(g1), multi_tensor.norm_squared(g1), **close)
    for scale in (1.0, torch.tensor(0.25)):
        scaled, other = copies(g1, g1)
        expected = multi_tensor.moments_(other, g2, scale=scale)
        torch.testing.assert_close(kernels.moments_(scaled, g2, scale=scale), expected, **close)
        assert_same(scaled, other)


@given(SIZES, SEEDS, DTYPES, DTYPES, st.sampled_from([0, 1]), st.sampled_from([1e-3, torch.tensor(0.25)]))
def test_weights_go_and_come_back(kernels, sizes, seed, of_weights, of_direction, offset, eps):
    """θ + ε·d rounded to the nearest, copies of θ, what arrived of the step, and θ again."""
    start, direction = random_lists(sizes, seed, of_weights, of_direction, offset=offset)
    moved, saved = copies(start, start)
    along, squares = kernels.shift_(moved, direction, saved=saved, eps=eps)
    assert_same(saved, start)
    expected = [(w.float() + float(eps) * d.float()).to(of_weights) for w, d in zip(start, direction, strict=True)]
    assert_near(moved, expected, of_weights)
    flat = [torch.cat([x.float() for x in xs]) for xs in (start, moved, direction)]
    torch.testing.assert_close(along, torch.dot(flat[1] - flat[0], flat[2]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(squares, torch.dot(flat[2], flat[2]), rtol=1e-5, atol=1e-5)
    kernels.copy_(moved, saved)
    assert_same(moved, start)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_weights_from_masters(kernels, dtype):
    """As ZeRO writes θ': the start is in float32 and stays."""
    (masters, direction), (written,) = (
        random_lists([200, 5], 0, torch.float32, torch.float32),
        random_lists([200, 5], 1, dtype),
    )
    before = copies(masters)[0]
    along, _ = kernels.shift_(written, direction, masters, eps=0.5)
    assert_same(masters, before)
    assert_same(written, [(m + 0.5 * d).to(dtype) for m, d in zip(masters, direction, strict=True)])
    arrived = [w.float() - m.to(dtype).float() for w, m in zip(written, masters, strict=True)]
    expected = sum(torch.dot(a, d) for a, d in zip(arrived, direction, strict=True))
    torch.testing.assert_close(along, expected, rtol=1e-4, atol=1e-4)


@given(SIZES, SEEDS, DTYPES, DTYPES, st.sampled_from([0.0, 0.3, 1.0, 10.0, 1e4]), st.booleans())
def test_combination(kernels, sizes, seed, first, second, weight, is_finite):
    """In float32, rounded once; exact at both ends; g1 where something is not finite."""
    g1, g2 = random_lists(sizes, seed, first, second)
    (combined,) = copies(g2)
    kernels.combine_(g1, combined, weight=torch.tensor(weight), clip=0.5, is_finite=torch.tensor(is_finite))
    wide = [(a.double(), 0.5 * b.double()) for a, b in zip(g1, g2, strict=True)]
    expected = [(a + weight * (b - a) if is_finite else a).to(second) for a, b in wide]
    torch.testing.assert_close(combined, expected, rtol=2 * torch.finfo(second).eps, atol=2e-6 * max(1.0, weight))
    if weight in (0.0, 1.0) and first == second:
        exact = [a if weight == 0 or not is_finite else (0.5 * b.float()).to(second) for a, b in zip(g1, g2, strict=True)]
        assert_same(combined, exact)


# NumPy's, in which the interpreter computes.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_not_a_number_replaces_nothing(kernels):
    """An overflow in g2 leaves g1, if the device is told so; and θ that is not finite comes back bit for bit."""
    g1, g2 = [torch.ones(3)], [torch.tensor([1.0, math.nan, math.inf])]
    kernels.combine_(g1, g2, weight=2.0, clip=1.0, is_finite=torch.tensor(False))
    assert_same(g2, g1)
    for dtype in (torch.bfloat16, torch.float32):
        odd = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-40]).to(dtype)
        bits = odd.view(torch.int16).clone()
        kernels.shift_([odd], [torch.ones(5)], saved=(saved := [torch.empty_like(odd)]), eps=1.0, seed=3)
        assert not odd[:3].isfinite().any()
        kernels.copy_([odd], saved)
        assert torch.equal(odd.view(torch.int16), bits)


def test_stochastic_rounding(kernels):
    """Right on average within five standard errors, as the one in torch alone is; neighbours only, and 0 stays."""
    share, count = 0.3, 20000
    weight, direction = torch.ones(count).bfloat16(), torch.full((count,), share * 2**-7)
    for interpreted in (kernels, None):
        moved, saved = weight.clone(), torch.empty_like(weight)
        if interpreted is None:
            multi_tensor.save_and_shift_([moved], [direction], eps=1.0, seed=5 << 40)
        else:
            interpreted.shift_([moved], [direction], saved=[saved], eps=1.0, seed=5 << 40)
        assert moved.unique().tolist() == [1.0, 1.0 + 2**-7]
        assert float((moved > 1).double().mean()) == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / count))
        neighbours = (moved[1:] > 1).double() * (moved[:-1] > 1).double()  # independent of each other
        assert float(neighbours.mean()) == pytest.approx(share**2, abs=0.02)
    zeros = torch.zeros(100).bfloat16()
    kernels.shift_([zeros], [torch.zeros(100)], saved=[torch.empty_like(zeros)], eps=1.0, seed=1)
    assert not zeros.any()


def test_random_bits_belong_to_step_and_tensor(kernels):
    """The same seed draws the same, another one does not; nor do two tensors of a list, two blocks or their quarters."""

    def moved(seed):
        tensors = [torch.ones(4 * BLOCK).bfloat16() for _ in range(2)]
        saved = [torch.empty_like(x) for x in tensors]
        kernels.shift_(tensors, [torch.full_like(x, 2**-8) for x in tensors], saved=saved, eps=1.0, seed=seed)
        return tensors

    first, again, other = moved(1 << 40), moved(1 << 40), moved(2 << 40)
    assert_same(first, again)
    parts = [*first[0].split(BLOCK // 4), *first[1].split(BLOCK // 4), *other[0].split(BLOCK // 4)]
    assert len({tuple(part.tolist()) for part in parts}) == len(parts)


def test_tables_are_kept(kernels):
    """While sizes and addresses stay the same, nothing is made or sent anew."""
    (xs,) = random_lists([5, 70], 0, torch.float32)
    kernels.norm_squared(xs)
    before = kernels._table.cache_info().misses, kernels._places.cache_info().misses
    kernels.norm_squared(xs)
    assert (kernels._table.cache_info().misses, kernels._places.cache_info().misses) == before


def step_of(dtype, **settings):
    """Three steps on a small network, the last of which raises in its second pass; weights, gradients and metrics."""
    torch.manual_seed(0)
    model, loss = regression(dtype=dtype)
    optimizer = unchecked(torch.optim.SGD(model.parameters(), lr=0.05), strength=0.1, check_every=0, **settings)
    for _ in range(2):
        optimizer.step(closure_of(optimizer, loss))
    return (
        weights(model),
        [p.grad.clone() for p in model.parameters()],
        {k: float(v) for k, v in optimizer.metrics.items()},
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [{"eps": 0.1}, {"radius": 0.05, "g1_clip": 0.1}, {"radius": 0.05, "method": "central"}],
    ids=str,
)
def test_whole_steps(interpreted, monkeypatch, dtype, settings):
    """Through the kernels as without them, and twice the same bits."""
    rounding = {"rounding": "nearest"}  # random bits differ from one back end to the other
    found, again = step_of(dtype, **settings, **rounding), step_of(dtype, **settings, **rounding)
    assert_same(found, again)
    monkeypatch.setattr(multi_tensor, "IS_INTERPRETED", False)
    expected = step_of(dtype, **settings, **rounding)
    tight = {"rtol": 1e-3, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.02}
    torch.testing.assert_close(found, expected, **tight)


def test_one_launch_an_operation(interpreted):
    """Of parameters of one dtype, however many there are."""
    parameters = [nn.Parameter(torch.ones(3, n).bfloat16()) for n in range(1, 30)]
    optimizer = past_the_first_step(unchecked(torch.optim.SGD(parameters, lr=0.1), radius=0.1))
    optimizer.step(closure_of(optimizer, lambda: sum(p.float().square().sum() for p in parameters)))
    assert interpreted == [
        "_norm_kernel",
        "_shift_kernel",
        "_copy_kernel",
        "_moments_kernel",
        "_combine_kernel",
    ]


def test_what_the_kernels_cannot_take_goes_elsewhere(interpreted):
    """float64, and layouts with holes: in one list with tensors that they can."""
    tensors = [
        torch.randn(4, 6),
        torch.randn(6, 4).t(),
        torch.randn(3, dtype=torch.float64),
        torch.randn(5).bfloat16(),
    ]
    expected = sum(x.double().square().sum() for x in tensors)
    torch.testing.assert_close(multi_tensor.norm_squared(tensors).double(), expected, rtol=1e-6, atol=0)
    assert interpreted == ["_norm_kernel", "_norm_kernel"]
    moved, start = copies(tensors, tensors)
    saved, _ = multi_tensor.save_and_shift_(moved, [torch.ones_like(x) for x in tensors], eps=torch.tensor(0.5))
    assert_same(saved, start)
    torch.testing.assert_close([m.double() for m in moved], [s.double() + 0.5 for s in start], rtol=0.01, atol=0.01)
    multi_tensor.restore_(moved, saved)
    assert_same(moved, start)


def test_a_step_sideways_draws_the_same(interpreted, monkeypatch):
    """Through the kernels as without them: signs do not depend on the back end."""
    (start, direction), found = random_lists([200, 5], 0, torch.bfloat16, torch.bfloat16), []
    for is_interpreted in (True, False):
        monkeypatch.setattr(multi_tensor, "IS_INTERPRETED", is_interpreted)
        (moved,) = copies(start)
        multi_tensor.save_and_shift_(moved, direction, eps=0.5, signs=3)
        found.append(moved)
    assert "_shift_kernel" in interpreted
    assert_near(*found, torch.bfloat16)


def test_weights_are_whole_if_a_launch_is_interrupted(interpreted, kernels, monkeypatch):
    """Before the kernel has run, and after it."""
    weight = torch.ones(100).bfloat16()
    launch = kernels._Launch.__call__

    def interrupted_before(self, kernel, *arguments, **constants):
        if kernel.fn.__name__ == "_shift_kernel":
            raise KeyboardInterrupt
        launch(self, kernel, *arguments, **constants)

    def interrupted_after(self, kernel, *arguments, **constants):
        launch(self, kernel, *arguments, **constants)
        if kernel.fn.__name__ == "_shift_kernel":
            raise KeyboardInterrupt

    for interrupted in (interrupted_before, interrupted_after):
        monkeypatch.setattr(kernels._Launch, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            multi_tensor.save_and_shift_([weight], [torch.ones(100)], eps=1.0, seed=1)
        assert_same(weight, torch.ones(100).bfloat16())


def test_a_triton_that_does_not_work_is_told_once(kernels, monkeypatch):
    """Without a C compiler, say: one warning, and what is in torch alone."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # but this torch is built without it
    back_end.kernels.cache_clear()
    try:
        with pytest.warns(UserWarning, match="Triton does not work here"):
            assert back_end.kernels() is None
        assert back_end.kernels() is None
    finally:
        back_end.kernels.cache_clear()


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_kernels_compile_for_a_gpu(tmp_path):
    """What the interpreter takes, the compiler takes too; aligned memory is read sixteen bytes at a time."""
    script = """
        import triton.language as tl
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource, compile
        from gradreg_optim.core.multi_tensor import triton_kernels as kernels

        pointers = {"table": "*i64", "places": "*i32", "is_finite": "*i1"}
        pointers |= {"count": "i32", "programs": "i32", "seed": "i64"}
        half, single = tl.bfloat16, tl.float32
        for kernel, constants in [
            (kernels._norm_kernel, {"X": half}),
            (kernels._copy_kernel, {"X": half}),
            (kernels._moments_kernel, {"F": half, "S": half}),
            (kernels._combine_kernel, {"F": half, "S": single}),
            (kernels._shift_kernel, {"W": half, "S": half, "D": half, "SAVES": True, "IS_STOCHASTIC": True}),
            (
                kernels._shift_kernel,
                {"W": tl.float16, "S": single, "D": single, "SAVES": False, "IS_STOCHASTIC": False},
            ),
        ]:
            constants |= {"BLOCK": kernels.BLOCK, "IS_ALIGNED": True}
            names = kernel.arg_names
            signature = {n: "constexpr" if n in constants else pointers.get(n, "*fp32") for n in names}
            values = {(names.index(n),): value for n, value in constants.items()}
            source = ASTSource(kernel, signature, values)
            assembly = compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
            assert "ld.global.v4.b32" in assembly, kernel
            assert "ld.global.b16" not in assembly, kernel
        print("compiled")
    """
    folders = {"HOME": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=250, env={"PATH": os.environ["PATH"], **folders})
    if "Constants keys must be string" in run.stderr:
        pytest.skip("triton before 3.3 describes a source otherwise")
    assert "compiled" in run.stdout, run.stderr
