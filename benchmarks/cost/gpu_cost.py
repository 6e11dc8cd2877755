"""Costs of gpu.py: steps of a model of Qwen2-0.5B's shape, and what a step does beyond its passes."""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cost.gpu_checks import needed
from benchmarks.cost.gpu_trainers import grpo_seconds
from benchmarks.cost.measuring import peak_bytes, timed
from benchmarks.cost.peers import PEERS, present
from benchmarks.cost.step_cost import affordable, in_turn, round_seconds, summarise
from benchmarks.cost.variants import PERIODS, Step, Subject, variants
from gradreg_optim import GradRegOptimizer

__all__ = [
    "CELLS",
    "NEAREST",
    "ON_GPU",
    "QWEN2",
    "SETTINGS",
    "TOY",
    "Cell",
    "Shape",
    "beyond",
    "grpo",
    "make_model",
    "measure",
]

NEAREST = 'GradRegOptimizer, rounding="nearest"'
ON_GPU = ("SAM", "davda54's SAM")
"""The peers that take part."""
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "GradRegOptimizer, bf16": ("bf16", {}),
    f"{NEAREST}, bf16": ("bf16", {"rounding": "nearest"}),
    "GradRegOptimizer, fp32": ("fp32", {}),
}
"""Whose step is measured without its passes: the arithmetic, and the settings."""


@dataclass(frozen=True)
class Shape:
    """A model of Qwen2's kind, the length of its sequences, a batch of GRPO, and how much is repeated and copied."""

    layers: int
    width: int
    inner: int
    heads: int
    vocabulary: int
    length: int
    completions: int
    new_tokens: int
    repeats: int
    copied: int


QWEN2 = Shape(24, 896, 4864, 14, 151936, 2048, completions=64, new_tokens=64, repeats=20, copied=2**30)
TOY = Shape(1, 32, 48, 4, 1024, 8, completions=8, new_tokens=4, repeats=4, copied=2**20)


@dataclass(frozen=True)
class Cell:
    """Some micro-batches of some sequences, in ``"bf16"`` or in ``"fp32"`` weights with bf16 autocast."""

    arithmetic: str
    accumulation: int
    sequences: int

    @property
    def name(self) -> str:
        return f"{self.arithmetic}, {self.accumulation} × {2 * self.sequences}k"

    @property
    def weight(self) -> int:
        """About in proportion to the seconds of a round."""
        return self.accumulation * self.sequences + 3


CELLS = [Cell(arithmetic, *sizes) for arithmetic, sizes in itertools.product(("bf16", "fp32"), ((1, 1), (1, 4), (4, 4)))]


def make_model(shape: Shape, device: torch.device, dtype: torch.dtype, vocabulary: int | None = None) -> Any:
    """The model with random weights."""
    needed("transformers")
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary or shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").train()


class Policy(Subject):
    """The model and the AdamW state that all variants share."""

    def __init__(self, shape: Shape, arithmetic: str, device: torch.device) -> None:
        self.shape, self.device, self.autocasts = shape, device, arithmetic == "fp32"
        self.model = make_model(shape, device, torch.float32 if self.autocasts else torch.bfloat16)
        self.parameters = list(self.model.parameters())
        self.gradients, self._state = 0.0, None
        self.take(1, 1)

    def take(self, micro_batches: int, sequences: int) -> None:
        """Let a step consist of so many micro-batches of so many sequences of random tokens."""
        shape = (micro_batches, sequences, self.shape.length)
        self.batches = torch.randint(self.shape.vocabulary, shape, device=self.device)

    def adamw(self, parameters: Any, **settings: Any) -> torch.optim.AdamW:
        return super().adamw(parameters, fused=True, **settings)

    def backward(self, tokens: Tensor) -> Tensor:
        self.gradients += 1 / len(self.batches)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocasts):
            loss = self.model(input_ids=tokens, labels=tokens, use_cache=False).loss / len(self.batches)
        loss.backward()
        return loss.detach()

    @property
    def count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters)


def steps_of(policy: Policy, cell: Cell) -> dict[str, Step]:
    """One step of each variant in this cell."""
    steps = variants(policy, cell, peers=False)
    if cell.accumulation == 1:
        del steps["GradRegOptimizer, every=4"]
    if cell.arithmetic == "bf16":
        nearest = GradRegOptimizer(policy.adamw(policy.parameters), rounding="nearest")
        steps[NEAREST] = lambda: nearest.step(policy.closure)
    return steps | {name: PEERS[name].build(policy) for name in ON_GPU if name in present()}


def measure(shape: Shape, cell: Cell, device: torch.device, seconds: float) -> dict[str, Any]:
    """The figures of one cell, from as many rounds as fit into ``seconds``."""
    policy = Policy(shape, cell.arithmetic, device)
    policy.take(cell.accumulation, cell.sequences)
    steps, optimizer = steps_of(policy, cell), policy.adamw(policy.parameters)
    policy.closure()
    optimizer.step()  # makes the state that all variants share
    peaks = {name: peaks_of(policy, step, PERIODS.get(name, 1)) for name, step in steps.items()}  # warms them up as well
    beyond_base = {name: {kind: peak[kind] - peaks["base"][kind] for kind in peak} for name, peak in peaks.items()}
    gradient, step = (timed(part, policy.device) for part in (policy.closure, optimizer.step))
    rounds = affordable(round_seconds(list(steps), gradient, step), seconds)
    times, gradients = in_turn(steps, policy, rounds, policy.device, cell.name)
    weights = policy.count * policy.parameters[0].element_size()
    return {
        "settings": asdict(cell),
        "parameters": policy.count,
        "rounds": rounds,
        "rows": summarise(times, gradients, beyond_base, weights),
        "seconds": times,
        "gradients": gradients,
        "peaks": beyond_base,
    }


def peaks_of(policy: Policy, step: Step, period: int) -> dict[str, int]:
    """Peak bytes of the first step, which may check the precision, and of those after it, beyond what is there before."""
    policy.model.zero_grad()
    if policy.device.type == "cuda":
        before, peaks = torch.cuda.memory_allocated(), []
        for _ in range(1 + period):
            torch.cuda.reset_peak_memory_stats()
            step()
            peaks.append(torch.cuda.max_memory_allocated() - before)
    else:
        peaks = peak_bytes([step] * (1 + period))
    return {"first": peaks[0], "usual": max(peaks[1:])}


def beyond(shape: Shape, arithmetic: str, device: torch.device, settings: dict[str, Any]) -> dict[str, Any]:
    """What a step of two gradients does beyond its passes and AdamW's step.

    Both are left out of the measurement: a closure that hands over prepared gradients stands for the passes, and a step of
    AdamW on such a gradient is subtracted.
    """
    policy = Policy(shape, arithmetic, device)
    optimizer, base = GradRegOptimizer(policy.adamw(policy.parameters), **settings), policy.adamw(policy.parameters)
    for _ in range(2):  # the first one may check the precision, the second one looks at gradients from before
        optimizer.step(policy.closure)
    prepared = itertools.cycle([[torch.randn_like(weight) * 1e-4 for weight in policy.parameters] for _ in range(2)])

    def hand_over() -> None:
        for parameter, gradient in zip(policy.parameters, next(prepared), strict=True):
            parameter.grad = gradient

    steps: list[Step] = [lambda: optimizer.step(hand_over), lambda: (hand_over(), base.step())]
    times = [[timed(step, device) for step in steps] for _ in range(shape.repeats)][2:]
    (launches, busy), (base_launches, base_busy) = (traced(step, device) for step in steps)
    rate, own = copy_rate(device, shape.copied), busy - base_busy
    return {
        "milliseconds": 1e3 * statistics.median(ours - least for ours, least in times),
        "launches": launches - base_launches,
        "busy_milliseconds": 1e3 * own,
        "copy_bytes_per_second": rate,
        "bytes_a_parameter": own * rate / policy.count,
        "seconds": times,
    }


def grpo(shape: Shape, device: torch.device) -> dict[str, Any]:
    """Steps of GRPO in bf16 with bf16 weights; with few words, so that the tokenizer has them all."""
    model = make_model(shape, device, torch.bfloat16, vocabulary=1024)
    return grpo_seconds(model, device, completions=shape.completions, tokens=shape.new_tokens, steps=8)


def traced(step: Step, device: torch.device) -> tuple[int, float]:
    """How many kernels, copies and fills a step launches, and the seconds for which they run; on a CPU, of operators."""
    kinds = ("kernel", "gpu_memcpy", "gpu_memset") if device.type == "cuda" else ("cpu_op",)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        with torch.profiler.profile() as profiler:
            timed(step, device)
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    own = [event["dur"] for event in events if event.get("cat") in kinds]
    return len(own), sum(own) / 1e6


def copy_rate(device: torch.device, size: int) -> float:
    """Bytes that the device reads and writes in a second of a large copy."""
    source = torch.ones(size, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * size / statistics.median([timed(lambda: target.copy_(source), device) for _ in range(12)][2:])
