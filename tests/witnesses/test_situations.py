"""Situations that came out wrong once: each is right, or refused, or told, by closure and by ``passes()``."""

import copy
import itertools
import warnings

import pytest
import torch
from problems import assert_same, by_closure, by_loop
from reference import combined, gradient_of
from torch import nn
from torch.nn import functional as F

from gradreg_optim import GradRegOptimizer

DRIVERS = {"argvalues": [by_closure, by_loop], "ids": ["closure", "passes"]}
FORMULA = {"strength": 0.1, "eps": 1e-2, "g1_clip": None, "g2_clip": None}


def sgd(parameters, lr=1.0, **settings):
    return GradRegOptimizer(torch.optim.SGD(parameters, lr=lr), **{**FORMULA, **settings})


def update_of(drive, optimizer, parameters, loss):
    """What one step takes from the weights."""
    before = [p.detach().clone() for p in parameters]
    drive(optimizer, loss)
    return [b - p.detach() for b, p in zip(before, parameters, strict=True)]


class Teacher(nn.Module):
    """A student and an average of it that each forward moves: in place, by ``.data``, or as another tensor."""

    def __init__(self, how):
        super().__init__()
        self.student = nn.Linear(4, 3)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.how = how

    @torch.no_grad()
    def move(self):
        for average, weight in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            if self.how == "in place":
                average.mul_(0.9).add_(weight, alpha=0.1)
            elif self.how == "by .data":
                average.data.mul_(0.9).add_(weight.data, alpha=0.1)
            else:
                average.data = 0.9 * average.data + 0.1 * weight.data

    def forward(self, x):
        self.move()
        return (self.student(x) - self.teacher(x + 0.3)).square().mean()


@pytest.mark.parametrize("how", ["in place", "by .data", "another tensor"])
@pytest.mark.parametrize("drive", **DRIVERS)
def test_a_teacher_moves_once(drive, how):
    """Frozen parameters that the forward moves are put back for the second pass."""
    model = Teacher(how).double()
    parameters, inputs = list(model.student.parameters()), torch.randn(8, 4, dtype=torch.float64)
    optimizer = sgd(parameters, lr=0.3)
    drive(optimizer, lambda: model(inputs))
    other = copy.deepcopy(model)
    start = copy.deepcopy(other.teacher.state_dict())

    def loss():
        other.teacher.load_state_dict(start)
        return other(inputs)

    expected = combined(gradient_of(list(other.student.parameters()), loss), strength=0.1, eps=1e-2)
    found = update_of(drive, optimizer, parameters, lambda: model(inputs))
    torch.testing.assert_close([x / 0.3 for x in found], expected)
    loss()  # at θ
    torch.testing.assert_close(model.teacher.state_dict(), other.teacher.state_dict())


class Counting(nn.Module):
    """Plain numbers and tensors in attributes: a counter, the longest input so far, a place in a memory."""

    def __init__(self):
        super().__init__()
        self.layer, self.calls, self.longest, self.last = nn.Linear(3, 4), 0, None, None
        self.register_buffer("memory", torch.zeros(6, 4))

    def forward(self, x):
        self.calls += 1
        self.longest = max(len(x), self.longest or 0)
        out = self.layer(x)
        self.memory[self.calls % 6] = out.detach().mean(0)
        self.last = out.detach()
        return (out - self.memory.clone().mean(0)).square().mean() * (self.calls + self.longest)


@pytest.mark.parametrize("drive", **DRIVERS)
def test_modules_count_once(drive):
    """Attributes are what they would be without the second pass, and so is the penalty."""
    model = Counting().double()
    inputs = torch.randn(5, 3, dtype=torch.float64)
    optimizer = sgd(model.parameters(), eps=1e-4, lr=0.1)
    for step in range(1, 4):
        start = copy.deepcopy(model)
        names = [name for name, _ in model.named_parameters()]

        def loss(start=start, names=names):
            other = copy.deepcopy(start)
            return torch.func.functional_call(other, dict(zip(names, start.parameters(), strict=True)), (inputs,))

        expected = combined(gradient_of(list(start.parameters()), loss), strength=0.1, eps=1e-4)
        found = update_of(drive, optimizer, list(model.parameters()), lambda: model(inputs))
        torch.testing.assert_close([x / 0.1 for x in found], expected)
        assert model.calls == step


@pytest.mark.parametrize("replaces", [False, True])
@pytest.mark.parametrize("drive", **DRIVERS)
def test_weights_that_the_first_forward_initializes(drive, replaces):
    """The first pass is run once more, at the weights that it wrote."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(3))
            self.register_buffer("is_known", torch.tensor(False))

        def forward(self, x):
            if not self.is_known:
                self.is_known.fill_(True)
                with torch.no_grad():
                    if replaces:
                        self.shift.data = -x.mean(0)
                    else:
                        self.shift.copy_(-x.mean(0))
            return (x + self.shift).tanh()

    model = nn.Sequential(nn.Linear(3, 3), Layer(), nn.Linear(3, 2)).double()
    inputs = 2 + torch.randn(16, 3, dtype=torch.float64)
    initialized = copy.deepcopy(model)
    initialized(inputs)
    start = [p.detach().clone() for p in initialized.parameters()]
    expected = combined(
        gradient_of(list(initialized.parameters()), lambda: initialized(inputs).square().mean()),
        strength=0.1,
        eps=1e-2,
    )
    drive(sgd(model.parameters()), lambda: model(inputs).square().mean())
    found = [s - p.detach() for s, p in zip(start, model.parameters(), strict=True)]
    torch.testing.assert_close(found, expected)


def test_weights_with_new_memory_come_back():
    """A forward that normalizes its weights by ``.data`` leaves them at θ."""
    layer = nn.Linear(4, 4, bias=False).double()
    inputs = torch.randn(8, 4, dtype=torch.float64)

    def loss():
        layer.weight.data = F.normalize(layer.weight.data, dim=1)
        return layer(inputs).square().sum()

    optimizer = sgd(layer.parameters(), check_every=0)
    for _ in optimizer.passes():
        optimizer.zero_grad()
        loss().backward()
    theta = layer.weight.detach().clone()
    torch.testing.assert_close(theta.norm(dim=1), torch.ones(4, dtype=torch.float64))
    assert_same(F.normalize(theta, dim=1), theta.clone() / theta.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("drive", **DRIVERS)
def test_a_loss_that_changes_later_goes_without_penalty(drive):
    """Once the loss draws its batch, the penalty is left out, counted and told once."""
    layer, batch = nn.Linear(4, 3).double(), torch.randn(8, 4, dtype=torch.float64)
    draws, step = itertools.count(2), 0

    def loss():
        return layer(batch if step < 3 else next(draws) * batch).square().mean()

    optimizer, told = sgd(layer.parameters(), lr=0.01, strength=1e-2, eps=1e-3), []
    for step in range(6):  # noqa: B007 (the loss reads it)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            drive(optimizer, loss)
        told += [str(warning.message) for warning in caught]
        assert float(optimizer.metrics["penalty_ratio"]) < 1
    assert float(optimizer.metrics["skipped"]) == 3
    assert [message for message in told if "loss_check" in message and "Remedy" in message] == told
    assert len(told) == 1


@pytest.mark.parametrize("clip", ["norm", "inf norm", "value"])
@pytest.mark.parametrize("drive", **DRIVERS)
def test_clips_inside_a_pass_act_on_the_combined_gradient(drive, clip):
    """As if they had been called after the passes."""
    layer, inputs = (
        nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double(),
        torch.randn(8, 4, dtype=torch.float64),
    )
    parameters = list(layer.parameters())
    clips = {
        "norm": lambda: nn.utils.clip_grad_norm_(parameters, 0.1),
        "inf norm": lambda: nn.utils.clip_grad_norm_(parameters, 0.05, norm_type=float("inf")),
        "value": lambda: nn.utils.clip_grad_value_(parameters, 0.02),
    }
    expected = combined(gradient_of(parameters, lambda: layer(inputs).square().mean()), strength=0.1, eps=1e-2)
    others = [nn.Parameter(p.detach().clone()) for p in parameters]
    for other, gradient in zip(others, expected, strict=True):
        other.grad = gradient.clone()
    own, parameters = parameters, others
    clips[clip]()
    parameters = own
    optimizer = sgd(parameters, check_every=0)
    before = [p.detach().clone() for p in parameters]

    def clipped_closure():
        optimizer.zero_grad()
        loss = layer(inputs).square().mean()
        loss.backward()
        clips[clip]()
        return loss

    if drive is by_closure:
        optimizer.step(clipped_closure)
    else:
        for _ in optimizer.passes():
            clipped_closure()
        optimizer.step()
    found = [b - p.detach() for b, p in zip(before, parameters, strict=True)]
    torch.testing.assert_close(found, [other.grad for other in others])


def test_gradients_that_are_normalized_in_each_pass_are_told():
    """By hand, so that nothing holds it back: both norms are equal to six digits."""
    layer, inputs = (
        nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double(),
        torch.randn(8, 4, dtype=torch.float64),
    )
    optimizer = sgd(layer.parameters(), lr=0.01, check_every=0, strength=1.0)

    def three_steps():
        for _ in range(3):
            for _ in optimizer.passes():
                optimizer.zero_grad()
                layer(inputs).square().mean().backward()
                length = torch.stack([p.grad.norm() for p in layer.parameters()]).norm()
                for p in layer.parameters():
                    p.grad /= length
            optimizer.step()
            assert optimizer.metrics

    with pytest.warns(UserWarning, match="‖g1‖ and ‖g2‖ are equal"):
        three_steps()


@pytest.mark.parametrize("clears_both", [False, True])
def test_another_optimizer_steps_on_the_gradient_at_theta(clears_both):
    """Muon for matrices and AdamW for the rest: gradients of other parameters are those of the first pass."""
    model, inputs = (
        nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double(),
        torch.randn(8, 4, dtype=torch.float64),
    )
    matrices, rest = ([p for p in model.parameters() if (p.ndim == 2) is wanted] for wanted in (True, False))
    optimizer, other = sgd(matrices), torch.optim.SGD(rest, lr=1.0)
    expected = torch.autograd.grad(model(inputs).square().mean(), rest)
    for _ in optimizer.passes():
        optimizer.zero_grad()
        if clears_both:
            other.zero_grad()
        model(inputs).square().mean().backward()
    torch.testing.assert_close([p.grad for p in rest], list(expected))


def test_parameters_that_the_closure_freezes_again():
    """GANs: requires_grad is on only inside the closure; two passes a step, as without."""
    model, inputs, calls = nn.Linear(4, 3).double(), torch.randn(8, 4, dtype=torch.float64), 0
    optimizer = sgd(model.parameters())

    def closure():
        nonlocal calls
        calls += 1
        model.requires_grad_(True)
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        model.requires_grad_(False)
        return loss

    for _ in range(2):
        optimizer.step(closure)
        assert float(optimizer.metrics["penalty_ratio"]) > 0
    assert calls == 4


@pytest.mark.parametrize("drive", ["closure", "passes"])
def test_a_backward_that_is_skipped_at_a_loss_that_is_not_finite(drive):
    """The step goes without penalty, and counts as skipped."""
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer, is_far = sgd([weight], lr=1e-3, check_every=0), False

    def body():
        optimizer.zero_grad()
        loss = weight.square().sum()
        if is_far and not torch.equal(weight.detach(), start):
            loss = loss * torch.inf
        if loss.isfinite():
            loss.backward()
        return loss

    for is_far in (False, True):  # noqa: B007 (the body reads it)
        start = weight.detach().clone()
        if drive == "closure":
            optimizer.step(body)
        else:
            for _ in optimizer.passes():
                body()
            optimizer.step()
    assert float(optimizer.metrics["skipped"]) == 1
    torch.testing.assert_close(weight.detach(), start - 1e-3 * 2 * start)


def test_groups_may_shrink():
    """It is parameters that are excluded, not places."""
    model, inputs = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))), torch.randn(8, 4)
    named = list(model.named_parameters())
    optimizer = sgd([{"params": named[:2]}, {"params": named[2:]}], lr=0.1, exclude="1.bias")
    assert [g["gradreg_excluded"] for g in optimizer.param_groups] == [[], [1]]
    by_closure(optimizer, lambda: model(inputs).square().mean())
    del optimizer.param_groups[0]
    by_closure(optimizer, lambda: model(inputs).square().mean())
    assert [g["gradreg_excluded"] for g in optimizer.param_groups] == [[1]]
    optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"][1:]
    by_closure(optimizer, lambda: model(inputs).square().mean())
    assert [g["gradreg_excluded"] for g in optimizer.param_groups] == [[0]]


def test_shared_memory_is_refused():
    """What another process writes at θ' would be lost."""
    layer = nn.Linear(2, 2)
    layer.share_memory()
    with pytest.raises(RuntimeError, match="memory that processes share"):
        by_closure(sgd(layer.parameters()), lambda: layer(torch.ones(3, 2)).sum())


def test_an_optimizer_that_writes_gradients_is_refused():
    """Opacus makes .grad from per-sample gradients in its step."""

    class DPOptimizer(torch.optim.SGD):
        pass

    private = type("Private", (DPOptimizer,), {})([nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(ValueError, match="optimizer=Private"):
        GradRegOptimizer(private)


def test_zero_grad_is_the_wrapped_optimizers():
    """An optimizer that clears more than .grad does so when the wrapper clears."""
    cleared = []

    class Clearing(torch.optim.SGD):
        def zero_grad(self, set_to_none=True):
            cleared.append(set_to_none)
            super().zero_grad(set_to_none)

    optimizer = GradRegOptimizer(Clearing([nn.Parameter(torch.ones(2))], lr=0.1))
    optimizer.zero_grad(set_to_none=False)
    assert cleared == [False]


def test_private_methods_of_the_wrapped_optimizer_are_there():
    """Transformers' AdafactorSchedule reads rates by ``_get_lr``; private flags stay out."""

    class Private(torch.optim.SGD):
        _step_supports_amp_scaling = True

        def _get_lr(self, group, state):
            return group["lr"]

    optimizer = GradRegOptimizer(Private([nn.Parameter(torch.ones(2))], lr=0.1))
    assert optimizer._get_lr(optimizer.param_groups[0], {}) == 0.1
    assert not hasattr(optimizer, "_step_supports_amp_scaling")


def test_a_step_that_was_the_wrapped_optimizers_is_told():
    """base.step() after passes(): warm-up, schedule and ``every`` would stand still."""
    layer, inputs = nn.Linear(4, 3), torch.randn(8, 4)
    base = torch.optim.SGD(layer.parameters(), lr=0.1)
    optimizer = GradRegOptimizer(base, warmup_steps=1)

    def loop():
        for _ in optimizer.passes():
            optimizer.zero_grad()
            layer(inputs).square().mean().backward()
        base.step()

    loop()
    with pytest.warns(UserWarning, match="began again before"):
        loop()


def test_a_step_that_the_weights_swallow_is_told():
    """A small loss in float32: most of the default step is rounded away."""
    layer, inputs = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2)), torch.randn(8, 8)
    optimizer = GradRegOptimizer(torch.optim.SGD(layer.parameters(), lr=0.1), strength=1e3, check_every=0)

    def three_steps():
        for _ in range(3):
            by_closure(optimizer, lambda: 1e-6 * layer(inputs).square().mean())
            assert optimizer.metrics

    with pytest.warns(UserWarning, match="perturbation_fidelity"):
        three_steps()


@pytest.mark.parametrize(("strength", "word"), [(1e-7, "next to nothing"), (1e4, "swamps")])
def test_ratios_that_need_a_word(strength, word):
    """In the mean of 20 steps."""
    layer, inputs = (
        nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double(),
        torch.randn(8, 4, dtype=torch.float64),
    )
    optimizer = sgd(layer.parameters(), lr=1e-9, strength=strength, check_every=0)

    def twenty_steps():
        for _ in range(20):
            by_closure(optimizer, lambda: layer(inputs).square().mean())

    with pytest.warns(UserWarning, match=word):
        twenty_steps()


def test_a_closure_after_the_passes():
    """Lightning's manual optimization hands over one that does nothing; others are refused."""
    layer, inputs = nn.Linear(4, 3), torch.randn(8, 4)
    optimizer = sgd(layer.parameters(), lr=0.1)

    def run():
        for _ in optimizer.passes():
            optimizer.zero_grad()
            layer(inputs).square().mean().backward()

    run()
    optimizer.step(lambda: None)
    assert optimizer.step_count == 1
    run()
    with pytest.raises(RuntimeError, match="changed the combined gradient"):
        optimizer.step(lambda: layer(inputs).square().mean().backward())


def test_a_loss_that_overflows_once_does_not_blind_the_witness():
    """A later loss that changes between the passes is seen as before."""
    layer, inputs = nn.Linear(4, 3).double(), torch.randn(8, 4, dtype=torch.float64)
    draws = itertools.count(2)
    optimizer = sgd(layer.parameters(), lr=0.0, strength=1e-2, eps=1e-3, check_every=0)
    for _ in range(2):
        by_closure(optimizer, lambda: layer(inputs).square().mean())
    by_closure(optimizer, lambda: layer(inputs).square().mean() + torch.inf)
    skipped = float(optimizer.metrics["skipped"])
    with pytest.warns(UserWarning, match="loss_check"):
        by_closure(optimizer, lambda: (next(draws) * layer(inputs)).square().mean())
    assert float(optimizer.metrics["skipped"]) == skipped + 1
