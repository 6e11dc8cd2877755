"""Further points and second derivatives in trainers, against the formula in float64; and the check in low precision."""

import warnings

import pytest
import torch
from test_trainer_update import EXCLUDED, LOSSES, completion_log_probabilities, distance, double, norm, trained
from trainers import REAL, Spy, assert_same, build, llama, penalties, weights

from gradreg_optim.trainers.unfused import LogProbabilities


def ratio_loss(model, window):
    """GRPO's, with the policy that sampled held fixed where it is differentiated twice."""
    total, tokens = 0.0, 0
    for inputs in window:
        log_p, mask = completion_log_probabilities(model, inputs)
        total = total - ((log_p - log_p.detach()).exp() * mask * inputs["advantages"][:, None]).sum()
        tokens = tokens + mask.sum()
    return total / tokens


LOSSES = LOSSES | {"grpo:importance": ratio_loss}


def derivatives(kind, model, values, window, at=0.0, direction=None):
    """∇L at θ + at·d, and H·d at θ if asked for it by at=0."""
    values = {name: value.double() for name, value in values.items()}
    if direction is not None:
        values = {name: value + at * direction[name] for name, value in values.items()}
    twin = double(model, values)
    twin.config._attn_implementation = "eager"
    names, parameters = zip(*twin.named_parameters(), strict=True)
    gradients = torch.autograd.grad(LOSSES[kind](twin, window), parameters, create_graph=True)
    if direction is None or at:
        return dict(zip(names, (gradient.detach() for gradient in gradients), strict=True))
    along = sum((gradient * direction[name]).sum() for name, gradient in zip(names, gradients, strict=True))
    return dict(zip(names, torch.autograd.grad(along, parameters), strict=True))


def formula(kind, model, values, window, method):
    g1 = derivatives(kind, model, values, window)
    d = {name: gradient * (not any(part in name for part in EXCLUDED)) for name, gradient in g1.items()}
    if method == "exact":
        product = derivatives(kind, model, values, window, direction=d)
    else:
        eps = REAL["eps"]
        plus, minus = (derivatives(kind, model, values, window, at=at, direction=d) for at in (eps, -eps))
        product = {name: (plus[name] - minus[name]) / (2 * eps) for name in plus}
    regularized = {name: not any(part in name for part in EXCLUDED) for name in g1}
    return {name: g1[name] + REAL["strength"] * product[name] * regularized[name] for name in g1}, g1


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    ("kind", "method"),
    [("sft", "central"), ("grpo", "central"), ("sft", "exact"), ("rloo", "exact"), ("grpo:importance", "exact")],
)
def test_first_update_is_the_formula(kind, method, accumulation, tmp_path):
    """The micro-batches run again as often as the method needs, with TRL's own losses and scalings."""
    name, _, resample = kind.partition(":")
    settings = REAL | {"method": method, "resample": resample or "reuse"}
    trainer, spy, steps = trained(name, tmp_path, wrapped=settings, gradient_accumulation_steps=accumulation)
    assert len(spy.inputs) == {"central": 3, "exact": 2}[method] * accumulation
    expected, g1 = formula(kind, trainer.model, steps.weights[0], spy.inputs[:accumulation], method)
    assert distance(expected, g1) > 0.02 * norm(g1)
    # Float32: a difference multiplies errors of 1e-6 by γ/ε = 5; a product has errors of its own, along one more graph.
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
    trainer = build("sft", tmp_path, wrapped=REAL, bf16=True)
    spy = Spy(trainer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Gradient regularization: the self-check")  # on so small a model it may be low
        trainer.train()
    assert len(spy.inputs) == 4 + 2 + 2
    floors = penalties(trainer, "noise_floor")
    assert len(set(floors)) == 1
    assert 1e-3 < floors[0] < 0.5
    assert len(penalties(trainer, "self_check")) == 1


def test_log_probabilities_written_out():
    """The stand-in for TRL's fused kernel returns what the kernel returns, every optional output included."""
    kernels = pytest.importorskip("trl.kernels.chunked_logprob", reason="this version of TRL has no fused kernel")
    hidden, weight, bias = torch.randn(7, 5), torch.randn(11, 5), torch.randn(11)
    targets = torch.randint(11, (7,))
    for softcap, scale in ((None, 1.0), (3.0, 0.5)):
        settings = (0.7, 4, softcap, scale, kernels.OPTIONAL_OUTPUTS)
        found = LogProbabilities.apply(hidden, weight, bias, targets, *settings)
        torch.testing.assert_close(found, kernels.ChunkedLogProbFunction.apply(hidden, weight, bias, targets, *settings))
    assert LogProbabilities.apply(hidden, weight, None, targets, 1.0, 4)[1:] == (None,) * 4


def test_exact_products_of_grpo_hold_the_old_policy(tmp_path):
    """Differentiating GRPO's loss holds the old policy fixed, which is not what "reuse" does: it has to be said."""
    with pytest.raises(RuntimeError, match=r"method='exact'.*resample='reuse'.*Pass resample='importance'"):
        build("grpo", tmp_path, wrapped=REAL | {"method": "exact"}).train()
