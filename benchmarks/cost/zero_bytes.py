"""How many bytes does regularization keep and send under ZeRO? Formulas, which small runs confirm.

P parameters on N ranks; b_w bytes for each weight that the passes run on, b_g bytes for each accumulated gradient element.

    kept on a rank beyond plain DeepSpeed, while the second pass runs
        b_g·P/N                                           the first gradient's partition

    sent by a rank beyond two backward passes and one step
        stages 1 and 2:   b_w·P·(N−1)/N                   one all-gather of the weights, on the way to θ'
        stage 3:          b_w·P_persistent·(N−1)/N        the same for the parameters too small to be partitioned
        2 all_reduces of a few fp32 scalars

For comparison, two gradients and one step of plain DeepSpeed. In a ring a rank sends (N−1)/N of a tensor for an all-gather
or a reduce-scatter.

        stages 1 and 2:   2 reduce-scatters of b_g·P and one all-gather of b_w·P
        stage 3:          2 · (2 all-gathers of b_w·P and one reduce-scatter of b_g·P)

``tests/benchmarks/test_benchmarks.py`` compares the bytes kept and gathered with those counted on two ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.common.tables import markdown_table

__all__ = ["LLAMA_70B", "Sharding", "llama_sizes", "section"]

SCALARS = 20
"""Bytes of each of the two all_reduces: up to five fp32 numbers."""


@dataclass(frozen=True)
class Sharding:
    """One model, sharded over a number of ranks.

    Args:
        sizes: elements of each parameter, in the order in which DeepSpeed flattens them.
        ranks: N.
        stage: 1, 2 or 3.
        weight_bytes: b_w.
        gradient_bytes: b_g.
        persistent: elements of the parameters that stage 3 does not partition (0 in stages 1 and 2).
    """

    sizes: Sequence[int]
    ranks: int
    stage: int
    weight_bytes: int = 2
    gradient_bytes: int = 2
    persistent: int = 0

    @property
    def padded(self) -> int:
        """P with the padding of the flat tensor, which makes the slices even in length."""
        multiple = 2 * self.ranks
        return math.ceil(sum(self.sizes) / multiple) * multiple

    def kept(self, rank: int) -> int:
        """Bytes of the first gradient that ``rank`` holds while the second pass runs."""
        if self.stage == 3:
            return self.gradient_bytes * sum(self._slices(rank))
        first, end = rank * self.padded // self.ranks, (rank + 1) * self.padded // self.ranks
        inside = (min(end, start + size) - max(first, start) for start, size in self._placed())
        return self.gradient_bytes * sum(size for size in inside if size > 0)

    @property
    def gathered(self) -> int:
        """Bytes of the gathered tensors of the extra all-gathers."""
        return self.weight_bytes * (self.persistent if self.stage == 3 else self.padded)

    @property
    def sent(self) -> float:
        """Bytes that a rank sends in addition to two backward passes and one step."""
        return self._share * (self.gathered + 2 * 2 * SCALARS)

    @property
    def sent_plain(self) -> float:
        """Bytes that a rank sends for two gradients and one step without regularization."""
        elements, passes = sum(self.sizes), 2
        if self.stage == 3:
            return self._share * elements * passes * (2 * self.weight_bytes + self.gradient_bytes)
        return self._share * elements * (passes * self.gradient_bytes + self.weight_bytes)

    @property
    def kept_plain(self) -> float:
        """Bytes of weights, fp32 masters, two fp32 moments and one gradient that a rank holds without regularization."""
        elements, ranks = sum(self.sizes), self.ranks
        weights = elements / (ranks if self.stage == 3 else 1)
        gradients = elements / (1 if self.stage == 1 else ranks)
        return self.weight_bytes * weights + self.gradient_bytes * gradients + 12 * elements / ranks

    @property
    def _share(self) -> float:
        return (self.ranks - 1) / self.ranks

    def _placed(self) -> Iterator[tuple[int, int]]:
        start = 0
        for size in self.sizes:
            yield start, size
            start += size

    def _slices(self, rank: int) -> Iterator[int]:
        """Stage 3: the elements of each parameter that ``rank`` holds, without padding."""
        for size in self.sizes:
            length = math.ceil(size / self.ranks)
            yield max(0, min(length, size - rank * length))


def llama_sizes(*, layers: int, width: int, inner: int, kv: int, vocabulary: int) -> list[int]:
    """The sizes of a Llama's parameters, in its order: embedding, layers, last norm, head."""
    attention = [width * width, width * kv, width * kv, width * width]
    layer = [*attention, *3 * [width * inner], width, width]
    return [vocabulary * width, *layers * layer, width, vocabulary * width]


LLAMA_70B = llama_sizes(layers=80, width=8192, inner=28672, kv=1024, vocabulary=32000)


def section(ranks: int = 64) -> str:
    """The figures of a 70 B model, as part of a document."""
    total = sum(LLAMA_70B)
    norms = sum(size for size in LLAMA_70B if size <= 8192)
    rows = []
    for stage in (1, 2, 3):
        case = Sharding(LLAMA_70B, ranks, stage, persistent=norms if stage == 3 else 0)
        kept = max(case.kept(rank) for rank in range(ranks))
        of_kept, of_sent = f"{kept / case.kept_plain:.1%}", f"{case.sent / case.sent_plain:.2%}"
        rows.append([f"ZeRO-{stage}", f"{kept / 1e9:.2f} GB", of_kept, _bytes(case.sent), of_sent])
    words = f"""## A 70 B model on {ranks} GPUs, calculated

What a rank keeps and sends in a regularized step, beyond two gradients and one step of plain DeepSpeed: {total / 1e9:.1f} B
parameters in the shapes of Llama 2 70B, bf16 weights and gradients, fp32 masters and moments. "Plain keeps" is weights,
masters, moments and one gradient, without activations. "Plain sends" is two gradients and one step. If gradients are
accumulated in fp32, a rank keeps twice as much. The formulas are in [zero_bytes.py](../../cost/zero_bytes.py); counts on two
ranks confirm them."""
    head = ["stage", "keeps", "of what plain keeps", "sends", "of what plain sends"]
    return words + "\n\n" + "\n".join(markdown_table(head, rows))


def _bytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
