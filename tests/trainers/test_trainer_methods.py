"""Further points in trainers, against the formula in float64; and the check in low precision."""

import warnings

import pytest
from test_trainer_update import EXCLUDED, LOSSES, distance, double, norm, trained
from trainers import REAL, Spy, assert_same, build, first_passes, llama, penalties, weights


def formula(kind, model, values, window, *, strength, eps, **_):
    """g1 + (γ/2ε)·(g₊ − g₋), and g1, in float64."""

    def gradients(at):
        twin = double(model, at)
        sum(LOSSES[kind](twin, window)).backward()
        return {name: parameter.grad for name, parameter in twin.named_parameters()}

    values = {name: value.double() for name, value in values.items()}
    g1, moves = gradients(values), {name: float(not any(part in name for part in EXCLUDED)) for name in values}
    plus, minus = (
        gradients({name: value + step * moves[name] * g1[name] for name, value in values.items()}) for step in (eps, -eps)
    )
    weight = strength / (2 * eps)
    return {name: g1[name] + weight * moves[name] * (plus[name] - minus[name]) for name in g1}, g1


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_first_update_is_the_formula(kind, accumulation, tmp_path):
    """Central differences: the micro-batches run again twice, with TRL's own losses and scalings."""
    settings = REAL | {"method": "central"}
    trainer, spy, steps = trained(kind, tmp_path, wrapped=settings, gradient_accumulation_steps=accumulation)
    assert len(spy.inputs) == (first_passes(kind) + 1) * accumulation
    expected, g1 = formula(kind, trainer.model, steps.weights[0], spy.inputs[:accumulation], **REAL)
    assert distance(expected, g1) > 0.02 * norm(g1)
    # Float32: a difference multiplies errors of 1e-6 by γ/ε = 5.
    assert distance(steps.update(0), expected) < 2e-5 * norm(expected)


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_a_check_changes_nothing(kind, tmp_path):
    """Two more replays, and the same weights and figures of the trainer; the check is logged where it was made."""
    finals, logs = [], []
    for every in (0, 2):
        model = llama()
        trainer = build(kind, tmp_path, model=model, wrapped=REAL | {"check_every": every, "shrink": False})
        trainer.train()
        finals.append(weights(model))
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
    assert_same(*finals)
    for plain, checked in zip(*logs, strict=True):
        assert {key: plain[key] for key in ("loss", "grad_norm")} == {key: checked[key] for key in ("loss", "grad_norm")}
    checks = penalties(trainer, "self_check")
    assert len(checks) == 2  # in the first and the third of three steps
    assert all(0.5 < value <= 1.0 for value in checks)  # the step is long enough for curvature to change
    assert all(0.99 < value <= 1.0 for value in penalties(trainer, "signal"))


def test_mixed_precision_is_checked_by_default(tmp_path):
    """With bf16 autocast over fp32 weights, the first step runs its micro-batch at two more points."""
    trainer = build("sft", tmp_path, wrapped=REAL | {"check_every": None}, bf16=True)
    spy = Spy(trainer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Gradient regularization: the self-check")  # on so small a model it may be low
        trainer.train()
    assert len(spy.inputs) == 4 + 2 + 2
    floors = penalties(trainer, "noise_floor")
    assert len(set(floors)) == 1
    assert 1e-3 < floors[0] < 0.5
    assert len(penalties(trainer, "self_check")) == 1
