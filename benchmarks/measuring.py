"""What all measurements of cost share: a model to step, a clock, a count of bytes, and the stamp of a result.

Times are compared within rounds: each variant takes a step in turn, and its time is divided by that of the floor in the same
round, so that a noisy machine is noisy for all of them alike.
"""

from __future__ import annotations

import itertools
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "GPT2_VOCABULARY",
    "RESULTS",
    "ROOT",
    "VOCABULARY",
    "Transformer",
    "between_marks",
    "keep_freed_memory",
    "parameter_count",
    "peak_bytes",
    "quartiles",
    "same_commit",
    "stamp",
    "timed",
]

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
VOCABULARY = 4096
GPT2_VOCABULARY = 50257
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}


class Transformer(nn.Module):
    """A causal language model out of torch's own layers, initialised as GPT-2 is, output and input embedding tied.

    The widths are multiples of 64. With this initialisation ‖∇L‖ is near 1, where no clip engages.
    """

    def __init__(self, *, layers: int, width: int, length: int, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(
            width, width // 64, 4 * width, dropout=0.0, batch_first=True, norm_first=True, activation="gelu"
        )
        self.layers = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.layers(self.embedding(tokens), mask=self.mask, is_causal=True)
        logits = hidden @ self.embedding.weight.T
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def parameter_count(*, layers: int, width: int, vocabulary: int = VOCABULARY) -> int:
    """The parameters of :class:`Transformer`, without building it."""
    with torch.device("meta"):
        model = Transformer(layers=layers, width=width, length=2, vocabulary=vocabulary)
    return sum(parameter.numel() for parameter in model.parameters())


def keep_freed_memory() -> None:
    """Start this program again with an allocator that keeps what is freed, as CUDA's does, unless it runs with one.

    glibc gives large pieces back to the system at once, and each page that comes anew costs a fault. How many do depends on
    the order in which pieces are freed: with 124 M parameters the floor took 690 thousand faults a step in a process of
    its own, and 150 thousand in turn with GradRegOptimizer, which is more than the difference that is measured here.
    """
    if sys.platform == "linux" and not ALLOCATOR.keys() <= os.environ.keys():
        os.execve(
            sys.executable, [sys.executable, *sys.orig_argv[1:]], {"KINETO_LOG_LEVEL": "99", **os.environ, **ALLOCATOR}
        )


def timed(step: Callable[[], Any], device: torch.device) -> float:
    """Seconds that ``step`` takes, the device's work included."""
    start = time.perf_counter()
    step()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def peak_bytes(steps: Iterable[Callable[[], Any]]) -> list[int]:
    """The most bytes allocated during each of ``steps``, taken one after the other, beyond those alive before the first.

    They are the highest points of the running sum of all that the allocators hand out and take back.
    """
    alive, peaks = 0, []
    for step in steps:
        with torch.profiler.profile(profile_memory=True) as profiler:
            step()
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        sums = list(itertools.accumulate(changes, initial=alive))
        peaks.append(max(sums))
        alive = sums[-1]
    return peaks


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def stamp() -> dict[str, str]:
    """Hardware, versions, commit and command, without which a figure means nothing."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    processor = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()}, CPU"
    return {
        "date": date.today().isoformat(),
        "hardware": f"{processor}, {torch.get_num_threads()} threads",
        "load": f"{os.getloadavg()[0]:.1f} processes at the end",
        "versions": f"torch {torch.__version__}, Python {platform.python_version()}",
        "commit": commit.stdout.strip() or "unknown",
        "command": f"python benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}".strip(),
    }


def same_commit(one: dict[str, str], other: dict[str, str]) -> bool:
    """Whether two stamps are of one commit. Results that a run writes make the tree dirty: that is no other commit."""
    return one["commit"].removesuffix("-dirty") == other["commit"].removesuffix("-dirty")


def between_marks(text: str, name: str, replacement: str) -> str:
    """``text`` with ``replacement`` between its lines ``<!-- name -->`` and ``<!-- end -->``.

    Raises:
        ValueError: there are no such lines.

    >>> between_marks("a\\n<!-- cost -->\\nold\\n<!-- end -->\\nb\\n", "cost", "new")
    'a\\n<!-- cost -->\\nnew\\n<!-- end -->\\nb\\n'
    """
    before, mark, rest = text.partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition("<!-- end -->")
    if not mark or not end:
        raise ValueError(f"the text must have a line '<!-- {name} -->' and, below it, a line '<!-- end -->'")
    return f"{before}{mark}{replacement.strip()}\n{end}{after}"
