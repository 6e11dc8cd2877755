"""How the accuracy benchmarks estimate H·g1: displaced weights, gradients there, and figures of an estimate.

A *scheme* says how the displaced weights θ' are written and which gradients are subtracted. An *arithmetic* says in which
precision a pass computes. All estimates are compared with H·g1 by double backward in float32 with eager attention, at the
weights that the first pass sees, which are rounded to bf16.

The second pass is the published one (``resample="reuse"``): the same tokens, weighted by the same advantages. So H is the
Hessian of −Σ A·log π.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from benchmarks.common.language_models import Arithmetic, Batch, loss
from gradreg_optim.core.multi_tensor.eager import StochasticRounding

Tensors = list[Tensor]
BFLOAT16_STEP = 2.0**-8  # relative size of the last bit of bf16, at its smallest
RADII = (0.0025, 0.005, 0.01, 0.02)
"""Where all schemes and arithmetics are compared."""
NORMS = (0.05, 0.5)
"""Gradient norms at which the published ε = 1e-3 is tried, besides the batch's own; a norm of 10 would be ρ = 0.01."""


def stochastically_rounded_(values: Tensor, random: torch.Generator) -> Tensor:
    """Round contiguous float32 ``values`` in place to values of bfloat16, as the optimizer does."""
    return StochasticRounding(int(torch.randint(2**62, (), generator=random))).round_(values)


class Passes:
    """A model in one arithmetic, whose weights can be displaced and restored. It changes the module that it is given.

    ``masters`` are float32 weights. θ is the masters rounded to bf16, as a bf16 forward pass sees them. It is not stored,
    but computed whenever it is needed.
    """

    def __init__(self, model: nn.Module, masters: Tensors, how: Arithmetic) -> None:
        self.how = how
        self.model = model.to(how.weights)
        self.parameters = list(self.model.parameters())
        self.masters = masters
        linear = {id(m.weight) for m in self.model.modules() if isinstance(m, nn.Linear)}
        linear -= {id(m.weight) for m in self.model.modules() if isinstance(m, nn.Embedding)}
        casts = how.autocast is not None and how.weights == torch.float32  # autocast rounds the weights of linear layers
        self._keeps_master = [casts and id(p) in linear for p in self.parameters]
        self.restore()

    def start(self, number: int) -> Tensor:
        """Parameter ``number`` at θ."""
        master = self.masters[number]
        return master if self._keeps_master[number] else master.bfloat16()

    @torch.no_grad()
    def restore(self) -> None:
        """Bring the weights back to θ."""
        for number, p in enumerate(self.parameters):
            p.copy_(self.start(number))

    def gradient(self, batch: Batch, *, rows: int | None = None, attention: str | None = None) -> Tensors:
        """The gradient at the current weights, accumulated over micro-batches of ``rows`` sequences."""
        self.model.set_attn_implementation(attention or self.how.attention)
        self.model.zero_grad(set_to_none=True)
        rows = rows or len(batch.tokens)
        for first in range(0, len(batch.tokens), rows):
            loss(self.model, batch, self.how, slice(first, first + rows)).backward()
        gradients = [p.grad for p in self.parameters]
        self.model.zero_grad(set_to_none=True)
        if self.how.weights == torch.float16:  # small elements would underflow in fp16 once unscaled
            gradients = [g.float() for g in gradients]
        if self.how.loss_scale != 1:
            torch._foreach_div_(gradients, self.how.loss_scale)
        return gradients

    def exact(self, batch: Batch, *, rows: int | None = None) -> tuple[Tensors, Tensors]:
        """∇L and H·∇L by double backward, over micro-batches of ``rows`` sequences; both in bf16."""
        direction = [g.bfloat16() for g in self.gradient(batch, rows=rows, attention="eager")]
        self.model.set_attn_implementation("eager")
        product: Tensors = []
        rows = rows or len(batch.tokens)
        for first in range(0, len(batch.tokens), rows):
            value = loss(self.model, batch, self.how, slice(first, first + rows))
            gradients = torch.autograd.grad(value, self.parameters, create_graph=True)
            along = [d.to(g.dtype) for d, g in zip(direction, gradients, strict=True)]
            part = list(torch.autograd.grad(gradients, self.parameters, along))
            del value, gradients, along
            if product:
                torch._foreach_add_(product, part)
            else:
                product = part
        return direction, [x.bfloat16() for x in product]

    @torch.no_grad()
    def displace(self, direction: Tensors, eps: float, rounding: str, random: torch.Generator) -> float:
        """Write θ' = θ + ε·d, and return the fidelity ⟨θ' − θ, ε·d⟩ / ‖ε·d‖².

        ``grid`` starts from the weights and rounds to the nearest value of their dtype. ``stochastic`` starts from the
        weights and rounds up or down at random, so that the mean is right. ``master`` starts from the float32 copy and
        rounds to the nearest.
        """
        inner = square = 0.0
        for number, (p, d) in enumerate(zip(self.parameters, direction, strict=True)):
            rounds = self._keeps_master[number] or p.dtype == torch.bfloat16
            tensors = (p, self.start(number), self.masters[number] if rounding == "master" and rounds else None, d)
            for piece, start, master, along in zip(*map(_blocks, tensors), strict=False):
                start, step = start.float(), along.float() * eps
                wanted = (start if master is None else master) + step
                if rounding == "stochastic":
                    stochastically_rounded_(wanted, random)
                piece.copy_(wanted)
                inner += float(torch.dot(piece.float() - start, step))
                square += float(torch.dot(step, step))
        return inner / square if square else math.nan

    @torch.no_grad()
    def flip(self, where: str = "norm", count: int = 8) -> None:
        """Move ``count`` weights of the first ``norm`` or ``linear`` layer by one bit of bf16, the smallest step."""
        dimensions = {"norm": 1, "linear": 2}[where]
        candidates = (m.weight for m in self.model.modules() if not isinstance(m, nn.Embedding) and hasattr(m, "weight"))
        weight = next(w for w in candidates if w.dim() == dimensions)
        piece = weight.data.flatten()[:count]
        weight.data.view(-1)[:count] = (piece.bfloat16().view(torch.int16) + 1).view(torch.bfloat16).to(weight.dtype)


def _blocks(tensor: Tensor | None) -> Iterable[Tensor | None]:
    """Flat views of blocks that fit into a cache; an endless sequence of ``None`` for ``None``."""
    return itertools.repeat(None) if tensor is None else torch.split(tensor.view(-1), 2**18)


def jitter_(model: nn.Module) -> Tensors:
    """Move the weights off the coarse grid of the file, to values between two bf16 numbers. Return copies."""
    random = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data.mul_(torch.rand(p.shape, generator=random).mul_(2 * BFLOAT16_STEP).add_(1 - BFLOAT16_STEP))
    return [p.detach().clone() for p in model.parameters()]


def gram(*vectors: Tensors) -> Tensor:
    """The matrix of inner products of lists of tensors, summed in float64."""
    total = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
    for tensors in zip(*vectors, strict=True):
        for pieces in zip(*map(_blocks, tensors), strict=True):
            block = torch.stack([piece.float() for piece in pieces])
            total += (block @ block.T).double()
    return total


def subtract(a: Tensors, b: Tensors, factor: float = 1.0) -> Tensors:
    """factor·(a − b), rounded once, to bf16. Its error of 2⁻⁹ does not show in a cosine. ``factor`` is a power of two."""
    return [(x - y).mul_(factor).bfloat16() for x, y in zip(a, b, strict=True)]


def norm(tensors: Tensors) -> float:
    """The norm over all tensors."""
    return math.sqrt(sum(float(t.float().square().sum(dtype=torch.float64)) for t in tensors))


WEIGHTS = (1, 10, 100)  # γ/ε


@dataclass
class Figures:
    """The accuracy of one estimate δ ≈ ε·H·g1, from the inner products of g, H·g (both exact), g1 and δ."""

    products: Tensor
    eps: float
    floor: float = math.nan
    extra: dict[str, float] = field(default_factory=dict)

    def _between(self, a: Sequence[float], b: Sequence[float]) -> float:
        """The cosine of two combinations of (g, H·g, g1, δ)."""
        x, y = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
        bottom = math.sqrt(float(x @ self.products @ x) * float(y @ self.products @ y))
        return float(x @ self.products @ y) / bottom if bottom else 0.0

    @property
    def rel(self) -> float:
        return math.sqrt(float(self.products[3, 3] / self.products[2, 2]))

    @property
    def shrink(self) -> float:
        return max(0.0, 1 - (self.floor / self.rel) ** 2) if self.rel else 0.0

    def row(self) -> dict[str, float | None]:
        _, h, _, delta = range(4)
        length = float(self.products[h, h])
        figures = {
            "cosine": self._between((0, 1, 0, 0), (0, 0, 0, 1)),
            "norm_ratio": math.sqrt(float(self.products[delta, delta]) / length) / self.eps,
            "projection": float(self.products[h, delta]) / length / self.eps,
            "rel": self.rel,
            "floor": self.floor,
            "shrink": self.shrink,
            "eps": self.eps,
            "g1_cosine": self._between((1, 0, 0, 0), (0, 0, 1, 0)),
        }
        for weight in WEIGHTS:
            exact = (1, weight * self.eps, 0, 0)
            figures[f"combined_{weight}"] = self._between(exact, (0, 0, 1, weight))
            figures[f"shrunk_{weight}"] = self._between(exact, (0, 0, 1, weight * self.shrink))
            figures[f"plain_{weight}"] = self._between(exact, (0, 0, 1, 0))
        figures |= self.extra
        return {name: None if math.isnan(value) else round(value, 6) for name, value in figures.items()}


def halvings(top: float, count: int) -> Iterator[float]:
    """``count`` radii up to ``top``, each twice the one before."""
    yield from (top / 2**k for k in reversed(range(count)))
