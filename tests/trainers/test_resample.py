"""What the second pass makes of a policy's completions: by exact summation over all of them, and in real trainers."""

import functools
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from test_trainer_update import EXCLUDED, completion_log_probabilities, distance, double, norm, trained
from torch.optim import SGD
from trainer_kinds import build_kind, find
from trainers import AT_THETA, REAL, UNCLIPPED, assert_same, at_theta, build, llama, penalties, weights
from transformers import LlamaForCausalLM
from transformers.utils import ModelOutput
from trl import GRPOTrainer, RLOOTrainer, SFTTrainer

from gradreg_optim import GradRegConfig, GradRegOptimizer, Point, attach, reweighted
from gradreg_optim.trainers.old_policy import FirstPass, OldPolicy, clipped_by_loss, clipped_so_far

pytestmark = at_theta

ACTIONS, PROMPT = 5, 3
EXACT = 1e-12
"""Relative, for float64 sums over a hundred completions in another order."""


class Policy(LlamaForCausalLM):
    """A policy over five tokens that sees the last one only, in float64: logits = U·tanh(E[token])."""

    def __init__(self):
        config = llama().config
        config.update({"vocab_size": ACTIONS, "hidden_size": 4, "num_hidden_layers": 0})
        super().__init__(config)
        del self.model.norm
        torch.manual_seed(5)
        for parameter in self.double().parameters():
            torch.nn.init.normal_(parameter)

    def forward(self, input_ids, attention_mask=None, labels=None, fused_lm_head=False, use_cache=None):
        logits = self.lm_head(self.model.embed_tokens(input_ids).tanh())
        log_p = logits[:, :-1].log_softmax(-1)
        taken = log_p.gather(-1, input_ids[:, 1:, None]).squeeze(-1)
        return ModelOutput(logits=logits, log_probs=taken, entropy=-(log_p.exp() * log_p).sum(-1).detach())


def completions(length):
    """Every completion of at most that length, and its mask, (completions, length): token 0 ends one and fills it up."""
    ids = torch.tensor(list(itertools.product(range(ACTIONS), repeat=length)))
    ends = (ids == 0).long()
    after = ends.cumsum(1) - ends > 0
    each = (~after | (ids == 0)).all(1)
    return ids[each], (~after[each]).long()


def rewards(length):
    """A fixed reward A(y) for each of them."""
    return torch.randn(len(completions(length)[0]), dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def log_policy(length, at=None):
    """log π of every token of every completion, 0 where it has ended, as a function of the policy, or at weights ``at``."""
    ids, mask = completions(length)
    ids = torch.cat([torch.full((len(ids), 1), PROMPT), ids], 1)
    if at is None:
        return lambda policy: policy(ids).log_probs * mask
    with torch.no_grad():
        return torch.func.functional_call(Policy(), at, (ids,)).log_probs * mask


def gradient(at, loss):
    """∇loss(policy) at the weights ``at``, by name."""
    policy = Policy()
    policy.load_state_dict(at)
    found = torch.autograd.grad(loss(policy), list(policy.parameters()))
    return dict(zip(at, found, strict=True))


def loss_of(length):
    """L = −J = −Σ_y π(y)·A(y), which gradients of a policy estimate."""
    return lambda policy: -(log_policy(length)(policy).sum(1).exp() * rewards(length)).sum()


def hessian_product(at, direction, length):
    """H·d of L, by double backward."""
    policy = Policy()
    policy.load_state_dict(at)
    first = torch.autograd.grad(loss_of(length)(policy), list(policy.parameters()), create_graph=True)
    slope = sum((g * direction[name]).sum() for name, g in zip(at, first, strict=True))
    return dict(zip(at, torch.autograd.grad(slope, list(policy.parameters())), strict=True))


def expected_gradient(start, at, length, ratio, held=1.0):
    """E[g2] on completions of π_start: −Σ_y π_start(y)·A(y)·Σ_t w_t·r_t·∇log π_at(y_t), w of the named kind.

    ``held`` are the r_t, which do not depend on the point ``at``.
    """
    here = log_policy(length, start)
    log_w = log_policy(length, at) - here
    w = {
        "none": torch.ones_like(log_w),
        "token": log_w.exp(),
        "completion": log_w.sum(1, keepdim=True).exp(),
    }[ratio]
    factor = here.sum(1, keepdim=True).exp() * rewards(length)[:, None] * w * held
    return gradient(at, lambda policy: -(factor * log_policy(length)(policy)).sum())


def moved(at, direction, eps):
    return {name: at[name] + eps * direction[name] for name in at}


def difference(one, other, eps=1.0):
    return {name: (one[name] - other[name]) / eps for name in other}


KINDS = {"grpo": GRPOTrainer, "rloo": RLOOTrainer}
GMPO = find("GMPOTrainer")  # trl 0.27 has none
if GMPO:
    KINDS["gmpo"] = GMPO[0]


def second_gradient(kind, folder, *, length, eps, resample, old=None, method="forward", **arguments):
    """The weights, and g2 of a trainer whose batch is every completion, each with its probability in its advantage.

    ``old`` are the weights of the policy that drew them, if that is another one.

    The step is SGD's at rate 1 with γ = ε, which makes it g2. The trainer and its loss are TRL's; only what they are given
    is not sampled, and the policy keeps its own head, for trl 1.16's works in float32.
    """
    policy, (ids, mask), loss = Policy(), completions(length), arguments.get("loss_type", {"grpo": "dapo"}.get(kind, kind))
    start = {name: value.double() for name, value in weights(policy).items()}
    log_p, count = log_policy(length, start), len(ids)
    # What the losses divide by: the number of completions, that of tokens, the longest completion.
    divisor = {"grpo": mask.sum(1), "sapo": mask.sum(1), "luspo": 1, "gmpo": mask.sum(1), "rloo": 1, "dr_grpo": length}.get(
        loss, int(mask.sum()) / count
    )
    inputs = {
        "prompt_ids": torch.full((count, 1), PROMPT),
        "prompt_mask": torch.ones(count, 1, dtype=torch.long),
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": log_p.sum(1).exp() * rewards(length) * count * divisor,
        "num_items_in_batch": mask.sum(),
    }
    if kind == "rloo":
        inputs["old_logps"] = log_policy(length, start if old is None else old).sum(1)
    elif old is not None:
        inputs["old_per_token_logps"] = log_policy(length, old)
    base = KINDS[kind]
    unbounded = {"learning_rate": 1.0, "max_steps": 1, "max_grad_norm": 1e9}
    trainer = build(
        "rloo" if kind == "rloo" else "grpo",
        folder,
        model=policy,
        base=lambda model: SGD(model.parameters(), lr=1.0),
        wrapped={"strength": eps, "eps": eps, "exclude": "none", "resample": resample, **UNCLIPPED, "method": method},
        trainer_class=type(base.__name__, (base,), {"_prepare_inputs": lambda self, _: dict(inputs)}),
        **{**unbounded, "max_completion_length": length, **arguments},
    )
    vars(policy).pop("forward", None)
    trainer.train()
    return start, difference(start, weights(policy)), trainer


# trl 0.27 has no VESPO.
PLAIN_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "sapo", "vespo")
PLAIN_LOSSES = [name for name in PLAIN_LOSSES if name in str(GRPOTrainer._compute_loss.__code__.co_consts)]
LOSSES = [("grpo", {"loss_type": loss_type}) for loss_type in PLAIN_LOSSES]
LOSSES += [("grpo", {"loss_type": "cispo", "epsilon_high": 5.0}), ("grpo", {"importance_sampling_level": "sequence"})]
LOSSES += [("gmpo", {})] if GMPO else []


def named(value):
    return value if isinstance(value, str) else "-".join(map(str, value.values()))


def claims(length):
    """θ', the exact ∇L(θ') and E[g2] of each kind of ratio, at weights ``start``."""

    def at(start, eps):
        there = moved(start, gradient(start, loss_of(length)), eps)
        kinds = ("none", "token", "completion")
        means = {ratio: expected_gradient(start, there, length, ratio) for ratio in kinds}
        return gradient(there, loss_of(length)), means

    return at


def relative(one, other):
    return distance(one, other) / norm(other)


def test_only_the_ratio_of_whole_completions_is_unbiased():
    """(E[g2] − g1)/ε → H·g1 with it, error halving with ε; without it, or with ratios of tokens, most of H·g1 is missed."""
    start = {name: value.double() for name, value in weights(Policy()).items()}
    errors = {}
    for length in (1, 2, 3):
        g1 = gradient(start, loss_of(length))
        exact = hessian_product(start, g1, length)
        for eps in (2e-3, 1e-3):
            there = moved(start, g1, eps)
            for ratio in ("none", "token", "completion"):
                estimate = difference(expected_gradient(start, there, length, ratio), g1, eps)
                errors[length, ratio, eps] = relative(estimate, exact)
        assert errors[length, "completion", 1e-3] < 1e-3
        assert errors[length, "completion", 1e-3] == pytest.approx(errors[length, "completion", 2e-3] / 2, rel=0.01)
    assert errors[1, "token", 1e-3] < 1e-3
    # Of ‖H·g1‖, in this policy: the bias is as large as what is estimated, and does not vanish with ε.
    for eps in (2e-3, 1e-3):
        assert [errors[length, "none", eps] for length in (1, 2, 3)] == pytest.approx([1.03, 1.23, 1.20], abs=0.01)
        assert [errors[length, "token", eps] for length in (2, 3)] == pytest.approx([0.84, 1.00], abs=0.01)


@pytest.mark.parametrize(("kind", "arguments"), [*LOSSES, ("rloo", {})], ids=named)
def test_second_gradient_on_single_tokens_is_that_of_new_completions(kind, arguments, tmp_path):
    """Through each loss, E[g2] = ∇L(θ') at a finite ε when a completion is one token."""
    start, g2, trainer = second_gradient(kind, tmp_path, length=1, eps=0.05, resample="sequence", **arguments)
    exact, means = claims(1)(start, 0.05)
    assert relative(g2, exact) < EXACT
    assert relative(means["none"], exact) > 0.01  # or nothing would be shown
    assert penalties(trainer, "reweighted") == [1.0]
    has_range = arguments.get("loss_type") not in ("sapo", "vespo")
    assert penalties(trainer, "clipped_by_loss") == [0.0] * has_range


@pytest.mark.parametrize(
    ("kind", "arguments", "resample", "ratio"),
    [
        ("grpo", {}, "reuse", "none"),
        ("rloo", {}, "reuse", "completion"),
        ("rloo", {}, "sequence", "completion"),
        *[(kind, arguments, "sequence", "completion") for kind, arguments in LOSSES],
    ],
    ids=named,
)
def test_second_gradient_on_two_tokens_is_the_one_documented(kind, arguments, resample, ratio, tmp_path):
    """Each loss takes the ratio that the documentation says, and "sequence" makes it ∇L(θ') in all of them."""
    start, g2, trainer = second_gradient(kind, tmp_path, length=2, eps=0.05, resample=resample, **arguments)
    exact, means = claims(2)(start, 0.05)
    assert relative(g2, means[ratio]) < EXACT
    for other in means.keys() - {ratio}:
        assert relative(g2, means[other]) > 1e-3
    assert (relative(g2, exact) < EXACT) == (ratio == "completion")
    assert penalties(trainer, "reweighted") == [float(ratio != "none")]


def old_policy_loss(kind, model, old, window, epsilon):
    """GRPO's and RLOO's loss in float64 against old log-probabilities, and the fraction that it clips, per micro-batch."""
    total, tokens, fractions = 0.0, sum(inputs["completion_mask"].sum() for inputs in window), []
    for inputs, old_log_p in zip(window, old, strict=True):
        log_p, mask = completion_log_probabilities(model, inputs)
        advantages = inputs["advantages"].double()[:, None]
        if kind == "rloo":
            log_ratio = log_p.new_zeros(len(log_p), 1) + ((log_p * mask).sum(1) - inputs["old_logps"])[:, None]
        else:
            log_w = ((log_p - old_log_p) * mask).sum(1, keepdim=True).detach()
            log_ratio = log_p - log_p.detach() + log_w
        ratio = log_ratio.exp()
        clipped = torch.min(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon) * advantages)
        outside = ((ratio > 1 + epsilon) & (advantages > 0)) | ((ratio < 1 - epsilon) & (advantages < 0))
        if kind == "rloo":
            total = total - clipped.mean() / len(window)
            fractions.append(outside.double().mean())
        else:
            total = total - (clipped * mask).sum() / tokens
            fractions.append((outside * mask).sum() / mask.sum())
    return total, sum(fractions) / len(fractions)


def formula(kind, model, values, window, *, strength, eps, epsilon=(0.2, math.inf), **_):
    """g1 + (γ/ε)·(g2 − g1) with "old" held at ``values`` (GRPO) or as given (RLOO), and the fraction clipped at θ'.

    The clip ranges ``epsilon`` are those of the first pass and of the second.
    """
    values = {name: value.double() for name, value in values.items()}
    with torch.no_grad():
        old = [completion_log_probabilities(double(model, values), inputs)[0] for inputs in window]

    def gradients(at, epsilon):
        twin = double(model, at)
        loss, clipped = old_policy_loss(kind, twin, old, window, epsilon)
        loss.backward()
        return {name: parameter.grad for name, parameter in twin.named_parameters()}, clipped.item()

    moving = {name: float(not any(part in name for part in EXCLUDED)) for name in values}
    g1, _ = gradients(values, epsilon[0])
    there = {name: value + eps * moving[name] * g1[name] for name, value in values.items()}
    g2, clipped = gradients(there, epsilon[1])
    return {name: g1[name] + strength / eps * moving[name] * (g2[name] - g1[name]) for name in values}, clipped


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_first_update_is_the_formula(kind, accumulation, tmp_path):
    """On sampled completions of several tokens, θ moves by −g1 − (γ/ε)·(g2 − g1) with the old policy that is kept."""
    wrapped = {**REAL, "resample": "sequence"}
    trainer, spy, steps = trained(kind, tmp_path, wrapped, gradient_accumulation_steps=accumulation)
    start, window = steps.weights[0], spy.inputs[:accumulation]
    assert not any("old_per_token_logps" in inputs for inputs in spy.inputs)  # whole ratios are put in afterwards
    expected, _ = formula(kind, trainer.model, start, window, **REAL)
    assert distance(steps.update(0), expected) < 2e-5 * norm(expected)  # float32, times γ/ε, as for other updates
    assert penalties(trainer, "clipped_by_loss") == [0.0]
    if kind == "grpo":  # the settings are different operators
        published, _, published_steps = trained(kind, tmp_path, REAL, gradient_accumulation_steps=accumulation)
        assert penalties(published, "reweighted") == [0.0]
        assert distance(published_steps.update(0), expected) > 1e-3 * norm(expected)


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_what_was_not_clipped_at_theta_is_not_clipped_later(kind, tmp_path):
    """A range of 3e-4 would clip at θ − ε·d alone, were the ratio the one there: the differences ahead and behind agree."""
    settings = {"gradient_accumulation_steps": 2, "epsilon": 3e-4}
    wrapped = {**REAL, "resample": "sequence", "check_every": 1}
    trainer, spy, steps = trained(kind, tmp_path, wrapped, **settings)
    start, window = steps.weights[0], spy.inputs[:2]
    behind = {**REAL, "eps": -REAL["eps"]}
    _, clipped = formula(kind, trainer.model, start, window, epsilon=(3e-4, 3e-4), **behind)
    assert clipped > 0.1
    expected, _ = formula(kind, trainer.model, start, window, **REAL)
    assert distance(steps.update(0), expected) < 2e-5 * norm(expected)  # as above
    assert penalties(trainer, "self_check")[0] > 0.7  # a step in which curvature changes
    assert [entry["clip_ratio/region_mean"] for entry in trainer.state.log_history if "loss" in entry] == [0.0]  # at θ
    assert (trainer.epsilon_low, trainer.epsilon_high) == (3e-4, 3e-4)


def second_gradient_of_a_loop(start, loss, eps, old=None):
    """g2 of a loop over ``passes()`` on every completion; ``loss(ratio, weight)`` without their probabilities."""
    policy, (_, mask) = Policy(), completions(2)
    policy.load_state_dict(start)
    settings = {"strength": eps, "eps": eps, **UNCLIPPED, "check_every": 0}
    optimizer = GradRegOptimizer(SGD(policy.parameters(), lr=1.0), **settings)
    probabilities = log_policy(2, start).sum(1, keepdim=True).exp()
    for point in optimizer.passes():
        optimizer.zero_grad()
        log_p = log_policy(2)(policy)
        if point is Point.THETA:
            first = log_p.detach()
        ratio, weight = reweighted(log_p, mask, first, old)
        assert point is not Point.THETA or torch.equal(weight, torch.ones_like(weight))
        (probabilities * loss(ratio, weight) * mask).sum().backward()
    optimizer.step()
    return difference(start, {name: value.double() for name, value in weights(policy).items()})


def test_a_loop_reweights_as_a_trainer_does(tmp_path):
    """g2 is ∇L(θ') in a loop of one's own, too, through GRPO's loss by hand."""
    start, of_a_trainer, _ = second_gradient("grpo", tmp_path, length=2, eps=0.05, resample="sequence")
    g2 = second_gradient_of_a_loop(start, lambda ratio, weight: -weight * ratio * rewards(2)[:, None], 0.05)
    exact, means = claims(2)(start, 0.05)
    assert relative(g2, exact) < EXACT
    assert relative(g2, of_a_trainer) < EXACT
    unweighted = second_gradient_of_a_loop(start, lambda ratio, _: -ratio * rewards(2)[:, None], 0.05)
    assert relative(unweighted, means["none"]) < EXACT


def test_a_loop_clips_as_a_trainer_does(tmp_path):
    """On completions of an older policy, PPO's loss by hand, times the weight, has the gradient of TRL's."""
    old = weights(Policy())
    generator = torch.Generator().manual_seed(1)
    old = {name: value.double() + 0.3 * torch.randn(value.shape, generator=generator) for name, value in old.items()}
    settings = {"length": 2, "eps": 0.5, "resample": "sequence", "old": old}
    start, of_a_trainer, _ = second_gradient("grpo", tmp_path, **settings, epsilon=0.2)

    def loss(ratio, weight):
        advantages = rewards(2)[:, None]
        return -weight * torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)

    g2 = second_gradient_of_a_loop(start, loss, 0.5, log_policy(2, old))
    assert relative(g2, of_a_trainer) < EXACT
    unclipped = second_gradient_of_a_loop(start, lambda r, w: -w * r * rewards(2)[:, None], 0.5, log_policy(2, old))
    assert relative(g2, unclipped) > 0.01


def test_weights_are_not_rounded_to_half_precision():
    """Of log-probabilities in bfloat16, whose differences are exact where they are small."""
    first = torch.tensor([[-5.0, -6.0]], dtype=torch.bfloat16)
    log_p = (first + torch.tensor([[0.03125, 0.0]], dtype=torch.bfloat16)).requires_grad_()
    ratio, weight = reweighted(log_p, torch.ones(1, 2), first)
    assert ratio.tolist() == [[1.0, 1.0]]
    assert weight.tolist() == [[pytest.approx(math.exp(0.03125), rel=1e-6)]]
    assert not weight.requires_grad


EPSILON = 0.2
SMALL = {"radius": 0.03, "check_every": 1, "resample": "sequence", **UNCLIPPED}
CLIPPING = [("grpo", {"loss_type": name}) for name in ("grpo", "dapo", "cispo")]
CLIPPING += [("grpo", {"importance_sampling_level": "sequence"}), ("rloo", {})]


def held_ratio(loss, level, log_r, mask, epsilon):
    """What the loss takes for the ratio at θ, 0 where it clips: by its paper's formula, on every completion."""
    if loss == "rloo":
        log_r = log_r.sum(1, keepdim=True)
    if level == "sequence":
        log_r = log_r.sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    r, positive = log_r.exp(), rewards(mask.shape[1])[:, None] > 0
    if loss == "cispo":
        return r.clamp(max=epsilon)
    return r.masked_fill((positive & (r > 1 + epsilon)) | (~positive & (r < 1 - epsilon)), 0)


@pytest.mark.parametrize(("kind", "arguments"), CLIPPING, ids=named)
def test_what_the_first_pass_clipped_stays_clipped(kind, arguments, tmp_path):
    """With an older policy, g2 = −E_π'[r·A·∇log π'] with the r of θ, 0 where that was clipped, at a finite ε."""
    loss = arguments.get("loss_type", "dapo" if kind == "grpo" else kind)
    epsilon = {"cispo": 1.2, "rloo": 0.15}.get(loss, EPSILON)
    start = {name: value.double() for name, value in weights(Policy()).items()}
    noise = torch.Generator().manual_seed(1)
    old = {name: value + 0.3 * torch.randn(value.shape, generator=noise).double() for name, value in start.items()}
    settings = {"length": 2, "eps": 0.5, "resample": "sequence", "old": old}
    range_ = {"epsilon": epsilon, "epsilon_high": epsilon}
    _, g2, trainer = second_gradient(kind, tmp_path, **settings, **arguments, **range_)
    (_, mask), log_r = completions(2), log_policy(2, start) - log_policy(2, old)
    held = held_ratio(loss, arguments.get("importance_sampling_level"), log_r, mask, epsilon)
    g1 = expected_gradient(start, start, 2, "completion", held)
    there = moved(start, g1, 0.5)
    assert relative(g2, expected_gradient(start, there, 2, "completion", held)) < EXACT
    # The clip engages for some, and is not the one of the ratio at θ'.
    unclipped = held_ratio(loss, arguments.get("importance_sampling_level"), log_r, mask, math.inf)
    assert relative(g2, expected_gradient(start, there, 2, "completion", unclipped)) > 0.01
    log_w = (log_policy(2, there) - log_policy(2, start)).sum(1, keepdim=True)
    level = arguments.get("importance_sampling_level")
    later = log_r + log_w * (mask / mask.sum(1, keepdim=True) if loss == "rloo" else mask)
    later = held_ratio(loss, level, later, mask, epsilon) / log_w.exp()
    assert relative(g2, expected_gradient(start, there, 2, "completion", later)) > 1e-4
    if loss != "cispo":  # which counts positive advantages alone
        counts = mask if held.shape == mask.shape else torch.ones_like(held)
        clipped = ((held == 0) * counts).sum() / counts.sum()
        assert penalties(trainer, "clipped_by_loss") == [pytest.approx(float(clipped), abs=1e-6)]


def figures_of(kind, folder, method, epsilon, **arguments):
    """The figures of a trainer on sampled completions whose ratios leave the range of 0.2 around 1 at θ'."""
    settings = {"per_device_train_batch_size": 8, "max_completion_length": 12, "steps_per_generation": 1}
    settings |= {"epsilon": epsilon, "epsilon_high": epsilon, "max_grad_norm": 1e9, "max_steps": 4, **arguments}
    rate = 1e-5 if kind == "rloo" else 1e-4  # so low that no second iteration clips at θ
    trainer = build(
        kind,
        folder,
        base=lambda model: SGD(model.parameters(), lr=rate),
        wrapped={"strength": 1e-9, "method": method, **SMALL},
        **{"learning_rate": rate, **settings},
    )
    trainer.train()
    names = ("self_check", "curvature", "penalty_ratio", "clipped_by_loss")
    return {name: torch.tensor(penalties(trainer, name)) for name in names}


@pytest.mark.parametrize("method", ["forward", "central"])
@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize(("kind", "arguments"), CLIPPING, ids=named)
def test_a_clip_range_that_is_not_reached_at_theta_changes_nothing(kind, arguments, iterations, method, tmp_path):
    """Ratios of whole completions leave 1 ± 0.2 at θ'; self-check and curvature are those of 1 ± 10, to 2 %."""
    narrow, wide = (
        figures_of(kind, tmp_path, method, epsilon, num_iterations=iterations, **arguments) for epsilon in (EPSILON, 10.0)
    )
    # CISPO's bound is the weight itself: it is reached by each token, and all of the loss is 0.2 times as large.
    scale = EPSILON if arguments.get("loss_type") == "cispo" else 1.0
    for name, factor in (("self_check", 1.0), ("curvature", scale), ("penalty_ratio", scale)):
        torch.testing.assert_close(narrow[name], factor * wide[name], rtol=0.02, atol=0)
    if scale == 1:
        assert narrow["clipped_by_loss"].tolist() == [0.0] * 4


def test_completions_clipped_at_theta_keep_their_loss(tmp_path):
    """RLOO's loss stays the integral of its gradient where it clips: a weight would move it without a gradient."""
    trainer = build(
        "rloo",
        tmp_path,
        base=lambda model: SGD(model.parameters(), lr=1e-3),
        wrapped={"strength": 1e-9, **SMALL, "radius": 0.003, "check_every": 0},
        num_iterations=2,
        learning_rate=1e-3,
        per_device_train_batch_size=8,
        max_completion_length=12,
        steps_per_generation=1,
        max_steps=4,
        max_grad_norm=1e9,
    )
    trainer.train()
    assert penalties(trainer, "clipped_by_loss")[1::2] == [pytest.approx(1 / 8), pytest.approx(1 / 2)]
    assert penalties(trainer, "loss_check") == pytest.approx([1.0] * 4, abs=0.01)


def test_reused_completions_are_clipped(tmp_path):
    """RLOO's ratio refers to the policy that sampled: a range of 3e-4 clips at θ', and the pass ahead alone is counted."""
    settings = {"gradient_accumulation_steps": 2, "epsilon": 3e-4}
    trainer, spy, steps = trained("rloo", tmp_path, REAL | {"method": "central"}, **settings)
    ahead, behind = (
        formula("rloo", trainer.model, steps.weights[0], spy.inputs[:2], epsilon=(3e-4, 3e-4), strength=1.0, eps=eps)[1]
        for eps in (REAL["eps"], -REAL["eps"])
    )
    assert behind > 0.1
    assert ahead != behind
    assert penalties(trainer, "clipped_by_loss") == [pytest.approx(ahead, abs=1e-6)]  # no ratio is that near the edge


@pytest.mark.parametrize("tool_mask", [None, [1, 0]], ids=["", "tools"])
def test_whole_ratio_is_of_the_tokens_that_count(tool_mask):
    """Of one completion of two tokens and one that has ended, without the tokens that a tool wrote."""
    old_policy = OldPolicy(None)
    inputs = {"completion_mask": torch.tensor([[1, 1], [1, 0]])}
    if tool_mask is not None:
        inputs["tool_mask"] = torch.tensor([tool_mask, tool_mask])
    inputs["advantages"] = torch.tensor([2.0, -1.0])
    kept, there = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]]), torch.tensor([[-1.5, -1.0], [-3.25, -7.0]])
    with old_policy.repeating(inputs, FirstPass(kept)):
        assert old_policy(lambda: (there,))[0] is there
    assert torch.equal(inputs["old_per_token_logps"], there)
    log_w = torch.tensor([0.5, -0.25] if tool_mask is None else [-0.5, -0.25])
    assert torch.equal(inputs["advantages"], torch.tensor([2.0, -1.0]) * log_w.exp())


def test_sequence_starts_from_the_ratio_of_the_first_pass(tmp_path):
    """In a second iteration, where the policy is not the one that sampled any more, g2 at θ itself is still g1."""
    results = []
    for wrapped in (None, {**AT_THETA, "resample": "sequence"}):
        trainer = build("grpo", tmp_path, wrapped=wrapped, num_iterations=2, epsilon=0.5)
        trainer.train()
        results.append(weights(trainer.model))
    assert_same(*results)


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_at_theta_itself_training_is_plain(kind, tmp_path):
    """With a step too short to move a weight the ratio is 1 and training is plain, bit for bit, under dropout."""
    results = []
    for wrapped in (None, {**AT_THETA, "resample": "sequence"}):
        model = llama(attention_dropout=0.2)
        trainer = build(kind, tmp_path, model=model, wrapped=wrapped, gradient_accumulation_steps=2)
        trainer.train()
        results.append(weights(trainer.model))
    assert_same(*results)


def test_nothing_is_computed_twice(tmp_path):
    """The setting costs no forward pass, and what is kept is one number per token of a completion."""
    calls = {}
    for resample in ("reuse", "sequence"):
        trainer = build("grpo", tmp_path, wrapped={**REAL, "resample": resample}, max_steps=2)
        calls[resample] = 0

        def count(*_, resample=resample):
            calls[resample] += 1

        trainer.model.model.register_forward_hook(count)
        trainer.train()
    assert len(set(calls.values())) == 1


def test_settings_reach_the_loss_by_every_way(tmp_path):
    """As an argument of the optimizer, of attach, and from the command line's dataclass."""
    clips = {"grad_reg_g1_clip": 0, "grad_reg_g2_clip": 0}
    config = GradRegConfig(grad_reg_strength=0.05, grad_reg_eps=0.01, grad_reg_resample="sequence", **clips)
    results = []
    for wrapped, given in (
        ({**REAL, "resample": "sequence"}, None),
        (None, {**REAL, "resample": "sequence"}),
        (None, config),
    ):
        trainer = build("grpo", tmp_path, wrapped=wrapped)
        if given is not None:
            attach(trainer, **({"config": given} if given is config else given))
        trainer.train()
        assert set(penalties(trainer, "reweighted")) == {1.0}
        results.append(weights(trainer.model))
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


class OwnLoss(GRPOTrainer):
    """As Liger's does, computes its loss without asking the trainer for log-probabilities."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        return model(input_ids=ids).logits.square().mean()


@pytest.mark.filterwarnings("ignore:.*none has the penalty:UserWarning")  # a warm-up that lasts for all of it
@pytest.mark.parametrize("warmup_steps", [0, 3])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (functools.partial(build, "sft"), "SFTTrainer"),
        (functools.partial(build_kind, "DPOTrainer"), "DPOTrainer"),
        (functools.partial(build, "grpo", trainer_class=OwnLoss), "OwnLoss"),
        (functools.partial(build_kind, "OnlineDPOTrainer"), "OnlineDPOTrainer"),
    ],
    ids=["sft", "dpo", "own", "online-dpo"],
)
def test_losses_without_a_ratio_are_refused(make, name, warmup_steps, tmp_path):
    """At the first step, warm-up or not: the trainer is named, and the way out; the weights have not moved."""
    trainer = make(folder=tmp_path)
    attach(trainer, resample="sequence", warmup_steps=warmup_steps)
    before = weights(trainer.model)
    with pytest.raises(RuntimeError, match=f"{name}: resample='sequence' takes ratios .* Use resample='reuse'"):
        trainer.train()
    assert_same(weights(trainer.model), before)


def test_supervised_training_reports_no_ratio(tmp_path):
    """A trainer without an old policy has neither figure in its log."""
    trainer = build("sft", tmp_path, wrapped=REAL)
    assert isinstance(trainer, SFTTrainer)
    trainer.train()
    assert penalties(trainer, "strength")
    assert penalties(trainer, "reweighted") == penalties(trainer, "clipped_by_loss") == []


def test_only_what_the_loss_has_just_counted_is_reported():
    """A figure from before, of a loss that clipped then, is not this one's."""
    trainer = SimpleNamespace(_metrics={"train": {"cispo_clip_ratio": [0.5]}})
    before = clipped_so_far(trainer)
    assert clipped_by_loss(trainer, before) is None
    trainer._metrics["train"]["cispo_clip_ratio"].append(0.25)
    assert clipped_by_loss(trainer, before) == 0.25
