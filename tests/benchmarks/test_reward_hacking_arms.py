"""The arms of ``benchmarks/hacking``: names, budgets, and what the ablations do to a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="trl belongs to the demo extra")

from test_reward_hacking import module


def test_every_family_has_the_same_budget_and_names_its_runs_apart() -> None:
    """A name is the file of a run: each setting has its own, and it leads back to the setting."""
    arms = module("hacking.arms")
    assert {len(grid) for family, grid in arms.FAMILIES.items() if family != "none"} == {4}
    settings = [arm for grid in arms.FAMILIES.values() for arm in grid]
    every = [arms.at_rate(arm, rate) for arm in settings for rate in arms.RATES]
    every += arms.ablations(arms.named("gr-sequence-1")).values()
    every += [arms.WHOLE, *arms.MICRO_BATCHES]
    assert len({arm.name for arm in every}) == len(every)
    assert [arms.named(arm.name) for arm in every] == every
    assert all(arms.named(arm.name) == arm for arm in arms.CASE.values())
    with pytest.raises(ValueError, match=r"--arms kl-7: must be among none, rate-0\.5"):
        arms.named("kl-7")


def test_each_regularized_arm_says_whose_norm_it_has_or_nothing_at_all() -> None:
    """Defaults may change; what a published arm does may not."""
    arms = module("hacking.arms")
    named = [arm for grid in arms.FAMILIES.values() for arm in grid] + [arms.WHOLE, *arms.MICRO_BATCHES]
    named += arms.ablations(arms.named("gr-sequence-1")).values()
    for arm in named:
        assert not arm.wrapper or {"strength", "norm_of", "resample"} <= arm.wrapper.keys(), arm.name
        assert (arm.wrapper.get("norm_of") == "step") == (arm not in arms.MICRO_BATCHES), arm.name


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
