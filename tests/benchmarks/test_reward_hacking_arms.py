"""The arms of ``benchmarks/hacking``: names, budgets, and what the ablations do to a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="trl belongs to the demo extra")

from test_reward_hacking import module


def test_every_family_has_the_same_budget_and_names_its_runs_apart() -> None:
    """A name is the file of a run: two settings of one name would be taken for one, and the name leads back to it."""
    arms = module("hacking.arms")
    assert {len(grid) for family, grid in arms.FAMILIES.items() if family != "none"} == {4}
    settings = [arm for grid in arms.FAMILIES.values() for arm in grid]
    every = [arms.at_rate(arm, rate) for arm in settings for rate in arms.RATES]
    every += arms.ablations(arms.named("gr-sequence-1")).values()
    assert len({arm.name for arm in every}) == len(every)
    assert [arms.named(arm.name) for arm in every] == every
    with pytest.raises(ValueError, match=r"--arms kl-7: must be among none, rate-0\.5"):
        arms.named("kl-7")


def bowl(arm: Any, steps: int = 1, **settings: Any) -> tuple[list[list[torch.Tensor]], Any]:
    """Where each step of an arm took gradients of ½‖w‖², and its optimizer."""
    weight = torch.nn.Parameter(torch.linspace(-1, 2, 400))
    optimizer = arm.optimizer(torch.optim.SGD([weight], lr=0.1), g1_clip=None, g2_clip=None, **settings)
    visited: list[list[torch.Tensor]] = []

    def closure() -> torch.Tensor:
        visited[-1].append(weight.detach().clone())
        weight.grad = None
        loss = 0.5 * (torch.linspace(1, 3, 400) * weight.square()).sum()
        loss.backward()
        return loss

    for _ in range(steps):
        visited.append([])
        optimizer.step(closure)
    return visited, optimizer


@pytest.mark.parametrize("direction", ["gradient", "random", "previous"])
def test_the_step_aside_is_as_long_as_that_along_the_gradient(direction: str) -> None:
    """ε‖g1‖ at every step; along the gradient, along nothing in particular, or along the gradient of the step before."""
    arm = module("hacking.arms").Arm("x", {"strength": 0.25, "eps": 0.5}, direction=direction)
    visited, _ = bowl(arm, steps=3)
    before = None
    for start, moved in visited:
        g1, step = torch.linspace(1, 3, 400) * start, moved - start
        assert float(step.norm()) == pytest.approx(0.5 * float(g1.norm()), rel=1e-5)  # float32
        along = {"gradient": g1, "random": None, "previous": g1 if before is None else before}[direction]
        if along is None:
            assert abs(float(torch.cosine_similarity(step, g1, dim=0))) < 0.2
        else:
            assert float(torch.cosine_similarity(step, along, dim=0)) == pytest.approx(1, abs=1e-5)  # float32
        before = g1
    assert len({float(moved[0] - start[0]) for start, moved in visited}) == 3  # another step each time


@pytest.mark.parametrize("direction", ["random", "previous"])
def test_a_check_mirrors_the_step_aside(direction: str) -> None:
    """On a quadratic the self-check is 1 if, and only if, both of its points lie on one line through θ."""
    arm = module("hacking.arms").Arm("x", {"strength": 0.25, "eps": 0.5}, direction=direction)
    _, optimizer = bowl(arm, steps=3, check_every=1, shrink=False)
    assert float(optimizer.metrics["self_check"]) == pytest.approx(1, abs=1e-4)  # float32


def test_rounded_weights_are_on_the_grid_of_bfloat16_after_every_step() -> None:
    """At the start and after each step; the same steps without rounding leave the grid."""
    arms = module("hacking.arms")
    policy = torch.nn.Linear(20, 20)
    arm = arms.Arm("x", weights="rounded")

    def is_on_grid(weight: torch.Tensor) -> bool:
        return torch.equal(weight, weight.to(torch.bfloat16).float())

    assert not is_on_grid(policy.weight)
    assert arm.prepared(policy).weight.dtype == torch.float32
    assert is_on_grid(policy.weight)
    for kept, expected in ((arm, True), (arms.Arm("x"), False)):
        visited, _ = bowl(kept, steps=3)
        assert [is_on_grid(passes[0]) for passes in visited[1:]] == [expected] * 2


def test_bf16_weights_have_no_masters() -> None:
    """The policy itself is bfloat16, and so is what AdamW keeps of it."""
    arm = module("hacking.arms").named("none-bf16")
    policy = arm.prepared(torch.nn.Linear(4, 4))
    optimizer = arm.optimizer(torch.optim.AdamW(policy.parameters()))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = policy(torch.ones(2, 4, dtype=torch.bfloat16)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert policy.weight.dtype == torch.bfloat16
    assert optimizer.state[policy.weight]["exp_avg"].dtype == torch.bfloat16
