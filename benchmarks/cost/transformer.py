"""The model of the cost benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["GPT2_VOCABULARY", "VOCABULARY", "Transformer", "parameter_count"]

VOCABULARY = 4096
GPT2_VOCABULARY = 50257


class Transformer(nn.Module):
    """A causal language model made of torch's own layers, with GPT-2's initialisation and tied embeddings.

    The width must be a multiple of 64. With this initialisation ‖∇L‖ is near 1, so no clip engages.
    """

    def __init__(self, *, layers: int, width: int, length: int, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(
            width, width // 64, 4 * width, dropout=0.0, batch_first=True, norm_first=True, activation="gelu"
        )
        self.layers = nn.TransformerEncoder(
            layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False
        )
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """The mean cross-entropy of ``tokens`` (sequences, length)."""
        hidden = self.layers(self.embedding(tokens), mask=self.mask, is_causal=True)
        logits = hidden @ self.embedding.weight.T
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def parameter_count(*, layers: int, width: int, vocabulary: int = VOCABULARY) -> int:
    """The number of parameters of a :class:`Transformer`, which is not built."""
    with torch.device("meta"):
        model = Transformer(layers=layers, width=width, length=2, vocabulary=vocabulary)
    return sum(parameter.numel() for parameter in model.parameters())
