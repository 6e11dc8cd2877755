"""What regularization keeps and sends under ZeRO, as the benchmark counts it, is what formulas say."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("tqdm", reason="the benchmarks come with the extra [demo]")
pytest.importorskip("deepspeed", reason="DeepSpeed is an extra")

from benchmarks.cost import transformer, zero_cost


def kept(sizes: list[int], rank: int, ranks: int, stage: int) -> int:
    """Elements of the first gradient's partition on a rank, without padding."""
    if stage == 3:
        lengths = [math.ceil(size / ranks) for size in sizes]
        return sum(max(0, min(n, size - rank * n)) for n, size in zip(lengths, sizes, strict=True))
    part = padded(sizes, ranks) // ranks
    return max(0, min(part, sum(sizes) - rank * part))


def padded(sizes: list[int], ranks: int) -> int:
    """Elements of the flat tensor, whose slices are even in length."""
    return math.ceil(sum(sizes) / (2 * ranks)) * 2 * ranks


def test_counts_are_those_of_the_formulas() -> None:
    """A rank keeps its part of a gradient. Stages 1 and 2 gather all weights once more, stage 3 few."""
    args = zero_cost.parse_arguments(
        ["--quick", "--rounds", "1", "--warmup", "2", "--stages", "2", "3", "--precisions", "bfloat16"]
    )
    found = zero_cost.run(args)
    assert found.keys() == {"bfloat16 stage 2", "bfloat16 stage 3"}
    with torch.device("meta"):
        model = transformer.Transformer(layers=args.layers, width=args.width, length=2)
    sizes = [parameter.numel() for parameter in model.parameters()]
    generators = torch.get_rng_state().nbytes  # their state is kept as well, whatever the model
    for case, ranks in found.items():
        stage, persistent = int(case[-1]), ranks[0]["persistent_parameters"]
        gathered = persistent if stage == 3 else padded(sizes, args.ranks)
        for rank, figures in enumerate(ranks):
            extra = figures["extra_collectives"]
            beside = figures["kept_bytes"] - generators - 2 * kept(sizes, rank, args.ranks, stage)
            assert abs(beside) < 64, case  # scalars: metrics of this step come, those of the last one go
            tolerance = 64 if stage == 3 else 0  # padding
            assert extra.pop("all_gather bytes") == pytest.approx(2 * gathered, abs=tolerance), case
            assert extra.pop("all_reduce bytes") <= 64, case  # a few scalars
            assert extra.keys() == {"all_gather calls", "all_reduce calls"}, case
