"""What does a regularized step cost on a GPU?

    make gpu                                              # the tests marked ``cuda``, then this script
    python -m benchmarks.cost.gpu --quick --device cpu    # toy sizes, to see that everything runs

Three kinds of parts: steps of a model of Qwen2-0.5B's shape, compared with two gradients and one AdamW step
and with other optimizers; what a step does beyond its passes; and a step of GRPO that generates.

The parts run in the order of their importance. Each is written as soon as it is measured. A run that was
interrupted, or that ran out of time, continues with the parts that are missing, unless the commit has changed
or ``--fresh`` is given. Whatever needs a package that is not installed is left out, by name. The exit status
is 1 if a part failed; goals that are missed are only reported.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.common.arguments import add_output
from benchmarks.common.results import Record, todays, version_of
from benchmarks.common.tables import markdown_table
from benchmarks.cost.measuring import timed
from benchmarks.cost.peers import PEERS, missing, present
from benchmarks.cost.rounds import measured
from benchmarks.cost.step_tables import columns, table
from benchmarks.cost.subject import Step, Subject
from benchmarks.cost.variants import NAME, ours, variants
from gradreg_optim import GradRegOptimizer

PACKAGES = ("triton", "transformers", "trl", "accelerate", "pytorch_optimizer", "zij")
NEAREST = f'{NAME}, rounding="nearest"'
ON_GPU = ("SAM", "davda54's SAM")
"""The peers that take part."""
BEYOND = (("bf16", NAME), ("bf16", NEAREST), ("fp32", NAME))
"""Whose step is measured without its passes: arithmetic and variant."""
Part = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """A model of Qwen2's kind, the length of its sequences, a batch of GRPO, and the repetitions."""

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


Size = tuple[int, int]
SHORT, MIDDLE, LONG = SIZES = ((1, 1), (1, 4), (4, 4))


def make_model(shape: Shape, device: torch.device, dtype: torch.dtype, vocabulary: int | None = None) -> Any:
    """The model with random weights."""
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
    """The model and the AdamW state that all variants share, and random tokens."""

    def __init__(self, shape: Shape, device: torch.device, arithmetic: str, size: Size = SHORT) -> None:
        self.autocasts = arithmetic == "fp32"
        model = make_model(shape, device, torch.float32 if self.autocasts else torch.bfloat16)
        self.share(model, torch.randint(shape.vocabulary, (*size, shape.length), device=device))

    def adamw(self, parameters: Any, **settings: Any) -> torch.optim.AdamW:
        return super().adamw(parameters, fused=True, **settings)

    def backward(self, tokens: Tensor) -> Tensor:
        self.gradients += 1 / len(self.batches)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocasts):
            loss = self.model(input_ids=tokens, labels=tokens, use_cache=False).loss / len(self.batches)
        loss.backward()
        return loss.detach()

    def limit(self, micro_batches: int | None = None, *, sequences: int | None = None) -> None:
        """Nothing is limited: a GPU counts its memory at no cost."""


def measure(shape: Shape, cell: Cell, device: torch.device, seconds: float) -> Part:
    """The figures of one cell."""
    policy = Policy(shape, device, cell.arithmetic, (cell.accumulation, cell.sequences))
    steps = variants(policy, peers=False)
    if cell.accumulation == 1:
        del steps[f"{NAME}, every=4"]
    if cell.arithmetic == "bf16":
        steps[NEAREST] = ours(policy, rounding="nearest")
    steps |= {name: PEERS[name].build(policy) for name in ON_GPU if name in present()}
    count = sum(parameter.numel() for parameter in policy.parameters)
    return {"parameters": count, **measured(policy, steps, seconds=seconds, title=cell.name)}


def beyond(shape: Shape, arithmetic: str, name: str, device: torch.device, _seconds: float) -> Part:
    """What a step of two gradients does beyond its passes and AdamW's step.

    Both are left out of the measurement: a closure that hands over prepared gradients stands for the passes,
    and a step of AdamW on such a gradient is subtracted.
    """
    settings = {"rounding": "nearest"} if name == NEAREST else {}
    policy = Policy(shape, device, arithmetic)
    base = policy.adamw(policy.parameters)
    optimizer = GradRegOptimizer(policy.adamw(policy.parameters), **settings)
    for _ in range(2):  # the first one may check the precision, the second one looks at gradients from before
        optimizer.step(policy.closure)
    prepared = itertools.cycle([[torch.randn_like(w) * 1e-4 for w in policy.parameters] for _ in range(2)])

    def hand_over() -> None:
        for parameter, gradient in zip(policy.parameters, next(prepared), strict=True):
            parameter.grad = gradient

    steps: list[Step] = [lambda: optimizer.step(hand_over), lambda: (hand_over(), base.step())]
    times = [[timed(step, device) for step in steps] for _ in range(shape.repeats)][2:]
    (launches, busy), (base_launches, base_busy) = (traced(step, device) for step in steps)
    rate, own = copy_rate(device, shape.copied), busy - base_busy
    return {
        "milliseconds": 1e3 * statistics.median(one - other for one, other in times),
        "launches": launches - base_launches,
        "busy_milliseconds": 1e3 * own,
        "copy_bytes_per_second": rate,
        "bytes_a_parameter": own * rate / sum(parameter.numel() for parameter in policy.parameters),
        "seconds": times,
    }


def traced(step: Step, device: torch.device) -> tuple[int, float]:
    """The launches of a step (on a CPU: its operators), and the seconds for which they run."""
    kinds = ("kernel", "gpu_memcpy", "gpu_memset") if device.type == "cuda" else ("cpu_op",)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        with torch.profiler.profile() as profiler:
            timed(step, device)
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    durations = [event["dur"] for event in events if event.get("cat") in kinds]
    return len(durations), sum(durations) / 1e6


def copy_rate(device: torch.device, size: int) -> float:
    """Bytes that the device reads and writes in a second of a large copy."""
    source = torch.ones(size, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * size / statistics.median([timed(lambda: target.copy_(source), device) for _ in range(12)][2:])


def grpo(shape: Shape, device: torch.device, _seconds: float, *, steps: int = 8) -> Part:
    """Seconds of GRPO steps in bf16 that generate: with and without the second pass, in turn.

    Every other step is regularized. The first two, which warm up and check the precision, do not count.
    """
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from benchmarks.hacking.language import golds, request, tokenizer
    from benchmarks.hacking.world import COMMON

    draw, marks = random.Random(0), list[float]()

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            timed(lambda: None, device)  # waits for the device
            marks.append(time.perf_counter())

        on_step_end = on_step_begin

    words = tokenizer()
    model = make_model(shape, device, torch.bfloat16, vocabulary=len(words))
    optimizer = GradRegOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True), every=2)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        settings = {
            "use_cpu": device.type == "cpu",
            "bf16": True,
            "max_steps": steps,
            "logging_steps": 10 * steps,
            "per_device_train_batch_size": shape.completions,
            "num_generations": 4,
            "max_completion_length": shape.new_tokens,
            "generation_kwargs": {"min_new_tokens": shape.new_tokens},
            "beta": 0.0,
        }
        GRPOTrainer(
            model=model,
            reward_funcs=lambda prompts, completions, **_: golds(prompts, completions),
            args=GRPOConfig(folder, **COMMON | settings),
            train_dataset=Dataset.from_list([{"prompt": request(draw)} for _ in range(shape.completions)]),
            processing_class=words,
            optimizers=(optimizer, None),
            callbacks=[Clock()],
        ).train()
    seconds = [end - start for start, end in zip(marks[::2], marks[1::2], strict=True)]
    regularized, plain = (statistics.median(seconds[start::2]) for start in (2, 3))
    sizes = {"completions": shape.completions, "tokens": shape.new_tokens, "seconds": seconds}
    return {**sizes, "regularized": regularized, "plain": plain, "ratio": regularized / plain}


def parts_of(shape: Shape, device: torch.device) -> dict[str, tuple[float, Callable[[float], Part]]]:
    """By name, the most important part first: its share of the time, and the function that measures it."""
    cells = [Cell(arithmetic, *size) for arithmetic in ("bf16", "fp32") for size in SIZES]
    steps = {cell.name: (cell.weight, partial(measure, shape, cell, device)) for cell in cells}
    others = {f"beyond: {of[1]}, {of[0]}": (2, partial(beyond, shape, *of, device)) for of in BEYOND}
    parts = {**steps, **others, "GRPO": (11, partial(grpo, shape, device))}
    first = [*list(steps)[:3], next(iter(others)), "GRPO"]
    return {name: parts[name] for name in dict.fromkeys([*first, *parts])}


def run(record: Record, shape: Shape, device: torch.device, deadline: float) -> dict[str, str]:
    """Measure what is missing until the deadline. Returns what failed or was left out, with the reasons."""
    reasons, settings = {}, {"shape": asdict(shape), "device": device.type}
    todo = {name: part for name, part in parts_of(shape, device).items() if not record.has(name, settings)}
    while todo:
        total, left = sum(weight for weight, _ in todo.values()), deadline - time.monotonic()
        weight, part = todo.pop(name := next(iter(todo)))
        if left < 0:
            reasons[name] = "not measured: the time was up. Run it again to continue"
            continue
        try:
            figures = part(0.8 * left * weight / total)  # the rest of the share warms up
            versions = {package: found for package in PACKAGES if (found := version_of(package))}
            record.keep(name, {"settings": settings, "packages": versions, **figures})
        except ModuleNotFoundError as error:
            reasons[name] = f"left out: {error.name} is not installed here"
        except Exception as error:
            reasons[name] = f"failed: {type(error).__name__}: {str(error).splitlines()[:1]}"
            tqdm.write(traceback.format_exc(), file=sys.stderr)
        gc.collect()  # models are in circles of references
        torch.cuda.empty_cache()
    return reasons


def goals(parts: dict[str, Part]) -> Iterator[tuple[str, float, float | None]]:
    """What is aimed at, its bound, and the figure if it was measured."""

    def figure(size: Size, name: str = NAME, of: str = "to_floor") -> float | None:
        cell = parts.get(Cell("bf16", *size).name, {"rows": {}})
        return cell["rows"].get(name, {}).get(of)

    own, copies = parts.get(f"beyond: {NAME}, bf16", {}), "copies_beyond_base"
    yield "× floor, bf16, 4 × 8k tokens", 1.01, figure(LONG)
    yield "× floor, bf16, 1 × 2k tokens", 1.04, figure(SHORT)
    yield "launches beyond the passes, bf16", 60, own.get("launches")
    yield "bytes a parameter beyond the passes, bf16", 45, own.get("bytes_a_parameter")
    yield "× floor, `every=4`, bf16, 4 × 8k tokens", 0.63, figure(LONG, f"{NAME}, every=4")
    for size in SIZES:
        peers = [value for name in ON_GPU if (value := figure(size, name)) is not None]
        if peers:
            cell = Cell("bf16", *size).name
            yield f"× floor, {cell} tokens: ahead of the fastest peer", min(peers), figure(size)
    yield "weight copies beyond base, bf16, usual step", 2.0, figure(SHORT, of=copies)
    yield "weight copies beyond base, bf16, step of a check", 3.0, figure(SHORT, of=f"{copies}_first")


HOW = """`base` is AdamW, fused. `floor` is two gradients and one such step, the least that a method with a
second gradient can cost. The model has the shape of Qwen2-0.5B and random weights; "4 × 8k" are four
micro-batches of 8192 tokens, in sequences of 2048. bf16: weights, gradients and AdamW's state are bf16. fp32:
they are float32, under bf16 autocast. Each variant takes one step in turn; ratios are taken within a round.
In brackets: lower and upper quartile. Peak memory is that of the usual step, and of the first one, which
checks the precision, beyond that of the base step."""
HOW_BEYOND = """Measured without the passes: a closure hands over prepared gradients. A step of AdamW on such
a gradient is subtracted. Launches are kernels, copies and fills. "Busy" is the time for which they run; the
rest is the time between them. Bytes a parameter are what a copy on this device reads and writes in the busy
time: at least what the step moves."""


def goal_table(parts: dict[str, Part]) -> list[str]:
    """A row for each goal: met, missed or not measured."""
    rows = []
    for name, bound, figure in goals(parts):
        met = "not measured" if figure is None else "met" if figure <= bound else "**missed**"
        rows.append([name, f"≤ {bound:.4g}", "–" if figure is None else f"{figure:.4g}", met])
    return markdown_table(["goal", "bound", "figure", ""], rows)


def document(parts: dict[str, Part], reasons: dict[str, str]) -> str:
    """Everything, the goals first."""
    latest = list(parts.values())[-1] if parts else {"stamp": {}, "packages": {}}
    lines = [f"- {name}: {fact}" for name, fact in (latest["stamp"] | latest["packages"]).items()]
    cells = {name: part for name, part in parts.items() if "rows" in part}
    steps = {name: part for name, part in parts.items() if "launches" in part}
    written = ["# Cost of the regularized step on a GPU", "\n".join(lines)]
    written += ["## Goals", "\n".join(goal_table(parts))]
    if reasons:
        written += ["Without figures:", "\n".join(f"- {name}: {why}." for name, why in reasons.items())]
    written += ["## Steps", HOW, columns(cells)]
    if steps:
        keys = ("launches", "milliseconds", "busy_milliseconds", "bytes_a_parameter")
        rows = [[name, *(f"{part[key]:.4g}" for key in keys)] for name, part in steps.items()]
        head = ["step", "launches", "ms", "busy, ms", "bytes a parameter"]
        written += ["## Beyond the passes", HOW_BEYOND, "\n".join(markdown_table(head, rows))]
    if "GRPO" in parts:
        of = parts["GRPO"]
        words = f"""In bf16, {of["completions"]} completions of {of["tokens"]} tokens, generated by
Transformers under TRL. A regularized step takes {of["regularized"]:.2f} s, one without penalty
{of["plain"]:.2f} s: {of["ratio"]:.2f} ×. Every other step is regularized; medians of {len(of["seconds"]) - 2}
steps."""
        written += ["## GRPO with generation", words]
    for name, cell in cells.items():
        written += [f"### {name} tokens, {cell['rounds']} rounds", table(cell)]
    return "\n\n".join(written) + "\n"


def parse_arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.cost.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="toy sizes; the result goes to runs/quick")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--minutes", type=float, default=4.0, help="no part begins later than that")
    parser.add_argument("--fresh", action="store_true", help="measure again what the file has")
    add_output(parser, "gpu-cost")
    args = parser.parse_args(given)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here. A trial needs none: --quick --device cpu")
    if args.device == "cpu" and not args.quick:
        parser.error("--device cpu: without --quick the model is too large for a CPU. Add --quick")
    args.output = args.output or todays("gpu-cost", quick=args.quick)
    return args


def main(given: list[str] | None = None) -> int:
    """Measure and write; returns the exit status."""
    start, args = time.monotonic(), parse_arguments(given)
    record = Record(args.output.with_suffix(".json"), fresh=args.fresh)
    shape, device = TOY if args.quick else QWEN2, torch.device(args.device)
    with warnings.catch_warnings():
        # The self-check is low in bf16 on random tokens; TRL and Transformers warn of each other.
        warnings.filterwarnings("ignore", "Gradient regularization: the self-check")
        warnings.filterwarnings("ignore", category=FutureWarning)
        reasons = run(record, shape, device, start + 60 * args.minutes)
    absent = {name: reason for name, reason in missing().items() if name in ON_GPU}
    text = document(record.parts, reasons | absent)
    args.output.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    return int(any(reason.startswith("failed") for reason in reasons.values()))


if __name__ == "__main__":
    sys.exit(main())
