"""Which part of the penalty comes from the policy gradient, and which from the noise of the batches?

A step minimises L + (γ/2)·‖g‖² with the gradient g of one batch. The completions of the second pass are those drawn at θ,
reused or reweighted. Over such batches E[g] = ∇L, and

    E‖g‖² = ‖∇L‖² + tr Σ            Σ: the covariance of g
    E[H·g] = H·∇L + ½∇tr Σ          H, g: of one batch
    E[H·g'] = H·∇L                  g': of another batch

so the penalty with H and g of one batch, and the penalty with H and g of two batches, separate the two parts. Their cosines
with ∇L and with the gradient of gold, which the same completions give, say in which direction they push the policy.

Inner products are averaged over pairs of different batches. That is unbiased, because the noise of two batches is
independent. They are summed over seeds before cosines are computed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from benchmarks.common.tables import markdown_table
from benchmarks.hacking.arms import EPS, PLAIN, named
from benchmarks.hacking.language import golds, request, tokenizer
from benchmarks.hacking.run import kept, train
from benchmarks.hacking.study import Study, quiet, reporting
from benchmarks.hacking.world import Scale, World, prepare, sample

BATCHES = 96
"""Batches drawn at each point; a multiple of 4."""
POINTS = (0, 20, 40, 60, 90)
"""The steps of the plain run at which batches are drawn."""

COSINES = {
    "E[Hg], H∇L": ("own other", "own own", "other other"),
    "−E[Hg], ∇proxy": ("own proxy", "own own", "proxy proxy"),
    "−E[Hg], ∇gold": ("own gold", "own own", "gold gold"),
    "−H∇L, ∇gold": ("other gold", "other other", "gold gold"),
}
"""The names of ⟨x, y⟩, ‖x‖² and ‖y‖² for each cosine. "own": H and g of one batch; "other": of two batches."""
RESAMPLES = ("sequence", "reuse")


@dataclass
class Batch:
    """The completions of one step.

    ``ids`` (completions, tokens) are prompts and completions. ``counted`` (completions, generated tokens) marks the tokens
    up to and including the end token. ``proxy`` and ``gold`` are advantages by either reward. ``log_p`` are the
    log-probabilities with which the tokens were sampled.
    """

    ids: Tensor
    counted: Tensor
    proxy: Tensor
    gold: Tensor
    log_p: Tensor


def drawn(policy: PreTrainedModel, world: World, scale: Scale, draw: random.Random) -> Batch:
    """A batch as GRPO draws it."""
    prompts = [prompt for _ in range(scale.prompts_per_step) for prompt in [request(draw)] * scale.generations]
    ids, texts = sample(policy, prompts, scale.answer_tokens)
    written = ids[:, len(prompts[0]) :]
    ends = (written == tokenizer().eos_token_id).long()
    counted = ends.cumsum(1) - ends == 0
    with torch.no_grad():
        log_p = log_probabilities(policy, ids, counted)
    return Batch(ids, counted, *(advantages(r(prompts, texts), scale) for r in (world.proxy, golds)), log_p)


def advantages(rewards: Sequence[float], scale: Scale) -> Tensor:
    """GRPO's advantages: rewards minus the mean of their group, divided by its standard deviation if the scale says so."""
    groups = torch.tensor(rewards).view(-1, scale.generations)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + 1e-4) if scale.scale_rewards == "group" else centred).flatten()


def log_probabilities(policy: nn.Module, ids: Tensor, counted: Tensor) -> Tensor:
    """The log-probabilities of the generated tokens, (completions, tokens); 0 after the end token."""
    length = counted.shape[1]
    log_p = policy(input_ids=ids).logits[:, -length - 1 : -1].log_softmax(-1)
    return log_p.gather(-1, ids[:, -length:, None]).squeeze(-1) * counted


def gradient(policy: nn.Module, batch: Batch, by: Tensor, *, resampled: bool = False) -> Tensor:
    """The flat gradient of the loss with advantages ``by``. ``resampled``: completions are reweighted to ``policy``."""
    log_p = log_probabilities(policy, batch.ids, batch.counted)
    weights = by * (log_p.detach() - batch.log_p).sum(1).exp() if resampled else by
    loss = -(weights[:, None] * log_p).sum() / batch.counted.sum()
    return torch.cat([x.flatten() for x in torch.autograd.grad(loss, regularized(policy))])


def regularized(policy: Any) -> list[nn.Parameter]:
    """The parameters in the penalty: all except embeddings and output layer."""
    left_out = {id(m.weight) for m in (policy.get_input_embeddings(), policy.get_output_embeddings())}
    return [parameter for parameter in policy.parameters() if id(parameter) not in left_out]


def product(policy: nn.Module, batch: Batch, at_start: Tensor, along: Tensor, *, resampled: bool) -> Tensor:
    """H·along by a forward difference. ``at_start`` is the batch's gradient at the current weights."""
    parameters = regularized(policy)
    before = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter, step in zip(parameters, along.split([p.numel() for p in parameters]), strict=True):
            parameter.add_(step.view_as(parameter), alpha=EPS)
    moved = gradient(policy, batch, batch.proxy, resampled=resampled)
    with torch.no_grad():
        for parameter, start in zip(parameters, before, strict=True):
            parameter.copy_(start)
    return (moved - at_start) / EPS


def inner(xs: Tensor, ys: Tensor) -> float:
    """⟨E[x], E[y]⟩ of rows (batches, parameters), each from one batch. Pairs of the same batch are left out."""
    products = xs @ ys.T
    return float((products.sum() - products.diagonal().sum()) / (products.numel() - len(xs)))


def dissect(policy: PreTrainedModel, world: World, scale: Scale, seed: int, batches: int = BATCHES) -> dict[str, Any]:
    """Inner products of the mean gradients of proxy and gold, of the penalty E[H·g], and of H·∇L."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    many = [drawn(policy, world, scale, draw) for _ in range(batches)]
    g = torch.stack([gradient(policy, batch, batch.proxy) for batch in many])
    gold = torch.stack([gradient(policy, batch, batch.gold) for batch in many])
    found: dict[str, Any] = {
        "square": float(g.square().sum(1).mean()),
        "proxy proxy": inner(g, g),
        "gold gold": inner(gold, gold),
        "proxy gold": inner(g, gold),
    }
    quarters = torch.arange(batches).view(4, -1)

    def products(rows: Sequence[int], along: Tensor, resample: str) -> Tensor:
        """H·along of batches, one row each."""
        resampled = resample == "sequence"
        pairs = zip(rows, along, strict=True)
        return torch.stack([product(policy, many[i], g[i], v, resampled=resampled) for i, v in pairs])

    for resample in RESAMPLES:
        own = products(range(batches), g, resample)
        # ∇L from one quarter and H from another, in two pairs: factors of a product below have no batch in common.
        others = []
        for rows, directions in ((0, 2), (1, 3)):
            along = g[quarters[directions]].mean(0).expand(batches // 4, -1)
            others.append(products(quarters[rows].tolist(), along, resample))

        def of_other(ys: Tensor, others: list[Tensor] = others) -> float:
            """⟨H·∇L, E[y]⟩ of rows of one batch each."""
            halves = zip(others, (ys[quarters[[1, 3]].flatten()], ys[quarters[[0, 2]].flatten()]), strict=True)
            return float(sum((xs @ half.T).mean() for xs, half in halves) / 2)

        found[resample] = {
            "own own": inner(own, own),
            "own proxy": inner(own, g),
            "own gold": inner(own, gold),
            "own other": of_other(own),
            "other other": float((others[0] @ others[1].T).mean()),
            "other gold": of_other(gold),
        }
    return found


class Watch(TrainerCallback):
    """Calls ``look`` with the weights at the steps ``points`` of a run, and does not influence the run."""

    def __init__(self, points: Sequence[int], look: Callable[[Any], dict[str, Any]]) -> None:
        self.points, self.look = points, look
        self.found: list[dict[str, Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._look(0, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._look(state.global_step, model)

    def _look(self, step: int, model: nn.Module) -> None:
        if step in self.points:
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                self.found.append({"step": step, **self.look(model.state_dict())})


def noise_of_seed(scale: Scale, folder: Path, seed: int, update: Callable[[int], Any] | None = None) -> dict[str, Any]:
    """The figures along the plain run of a seed; read from the file if they were computed before."""
    with reporting(scale.steps, update) as tick:

        def compute() -> dict[str, Any]:
            world = prepare(scale, seed, folder / f"world-{seed}")
            policy = world.policy().eval()  # not a copy of the trained one, whose forward the trainer has replaced

            def look(weights: dict[str, Tensor]) -> dict[str, Any]:
                policy.load_state_dict(weights)
                return dissect(policy, world, scale, 1000 * seed + 500)

            watch = Watch(POINTS, look)
            with quiet():
                train(named(PLAIN), world, scale, seed, folder / "trainer", tick, [watch])
            return {"seed": seed, "points": watch.found}

        return kept(folder / f"noise-{seed}.json", compute)


def study_noise(study: Study, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The figures along the plain run of each seed."""
    tasks = [(study.scale, study.folder, seed) for seed in seeds]
    return study.work(noise_of_seed, tasks, "plain runs: steps", len(tasks) * study.scale.steps)


def noise_table(found: Sequence[dict[str, Any]]) -> list[str]:
    """One row for each point of the runs, pooled over seeds, with 95% bootstrap intervals."""
    titles = ["‖∇L‖² / E‖g‖²", "cos ∇proxy, ∇gold"]
    of_penalty = ["‖E[Hg]‖/‖∇L‖", *(f"cos {title}" for title in COSINES)]
    titles += [f"{resample}: {title}" for resample in RESAMPLES for title in of_penalty]
    rows = []
    for points in zip(*(one["points"] for one in found), strict=True):
        cells = [
            pooled(points, lambda sums: sums["proxy proxy"] / sums["square"]),
            pooled(points, lambda sums: cosine(sums, ("proxy gold", "proxy proxy", "gold gold"))),
        ]
        for resample in RESAMPLES:
            of = [{**point, **point[resample]} for point in points]
            cells.append(pooled(of, lambda sums: root(sums["own own"] / sums["proxy proxy"])))
            cells += [pooled(of, partial(cosine, names=names)) for names in COSINES.values()]
        rows.append([str(points[0]["step"]), *cells])
    return markdown_table(["step", *titles], rows)


def root(square: float) -> float:
    """The square root; NaN if noise has made the square negative."""
    return square**0.5 if square > 0 else math.nan


def cosine(sums: dict[str, float], names: tuple[str, str, str]) -> float:
    """⟨x, y⟩/(‖x‖‖y‖)."""
    product, x, y = (sums[name] for name in names)
    return product / (root(x) * root(y))


def pooled(points: Sequence[dict[str, Any]], figure: Callable[[dict[str, float]], float], draws: int = 2000) -> str:
    """A figure computed from sums over seeds, with its 95% bootstrap interval over seeds."""
    names = [name for name, value in points[0].items() if isinstance(value, float)]

    def of(chosen: Sequence[int]) -> float:
        return figure({name: sum(points[i][name] for i in chosen) for name in names})

    draw = random.Random(0)
    values = [of([draw.randrange(len(points)) for _ in points]) for _ in range(draws)]
    there = sorted(value for value in values if not math.isnan(value))
    if math.isnan(of(range(len(points)))) or len(there) < 0.9 * draws:
        return "lost in noise"
    low, high = there[int(0.025 * len(there))], there[int(0.975 * len(there))]
    return f"{of(range(len(points))):.2f} ({low:.2f} to {high:.2f})"
