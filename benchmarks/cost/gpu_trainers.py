"""Checks of gpu.py: SFT, GRPO and DPO of TRL in bf16; and what the second pass adds to a step of GRPO that generates."""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from io import StringIO
from typing import Any

import torch
from torch import Tensor

from benchmarks.cost.gpu_checks import Check, expect, needed
from gradreg_optim import GradRegOptimizer

STEPS = 3
PENALTY: dict[str, Any] = {"strength": 0.05, "radius": 0.1, "g1_clip": None, "g2_clip": None, "check_every": 0}
AT_THETA = {**PENALTY, "strength": 1e-30, "radius": None, "eps": 1e-30}
"""A step that moves no weight, and γ = ε, which makes g2 the combined gradient."""


@contextmanager
def surroundings(device: torch.device) -> Iterator[None]:
    """Kernels that add in a fixed order, where there are such."""
    os.environ |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "TRL_EXPERIMENTAL_SILENCE": "1"}
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield


def tokenizer(size: int) -> Any:
    """``size`` words: w0, w1, … and three special ones."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<eos>", "<unk>", *(f"w{number}" for number in range(size - 3))]
    words = Tokenizer(WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    inputs = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=words, model_input_names=inputs, padding_side="left", **special)


def dataset(kind: str, *, vocabulary: int, length: int, count: int) -> Any:
    """Random words in the columns that the trainer reads."""
    from datasets import Dataset

    draw = random.Random(0)
    names = {"SFT": ["text"], "GRPO": ["prompt"], "DPO": ["prompt", "chosen", "rejected"]}[kind]

    def text() -> str:
        return " " + " ".join(f"w{draw.randrange(vocabulary - 3)}" for _ in range(length))

    return Dataset.from_dict({name: [text() for _ in range(count)] for name in names})


def reward(completions: list[str], **_: Any) -> list[float]:
    """The sum of the words' numbers, which hardly two completions have in common."""
    return [float(sum(int(word[1:]) for word in completion.split() if word[0] == "w")) for completion in completions]


def make_trainer(
    kind: str, model: Any, optimizer: Any, data: Any, device: torch.device, given: dict[str, Any], **more: Any
) -> Any:
    """A trainer of ``kind`` in bf16; ``given`` are further arguments, ``more`` further settings."""
    trl = needed("trl")
    config = getattr(trl, f"{kind}Config")(
        **{
            "report_to": "none",
            "use_cpu": device.type == "cpu",
            "bf16": True,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "per_device_train_batch_size": 2,
            "max_steps": STEPS,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            **more,
        }
    )
    return getattr(trl, f"{kind}Trainer")(
        model=model,
        args=config,
        train_dataset=data,
        processing_class=tokenizer(model.config.vocab_size),
        optimizers=(optimizer, None),
        **given,
    )


SETTINGS_OF = {"SFT": {}, "DPO": {}, "GRPO": {"num_generations": 2, "max_completion_length": 6, "beta": 0.0}}


def llama(dtype: torch.dtype) -> Any:
    """Two layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=24,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,  # far enough from uniform predictions for the curvature to be felt
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).to(dtype)


def trained(
    kind: str, device: torch.device, dtype: torch.dtype, settings: dict[str, Any] | None
) -> tuple[list[Tensor], Any]:
    """Weights and log after three steps of AdamW, in a GradRegOptimizer with ``settings`` unless they are ``None``."""
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # transformers 4.57 leaves it for the next trainer
    model = llama(dtype).to(device)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if settings is not None:
        optimizer = GradRegOptimizer(optimizer, **settings)
    given = {"SFT": {}, "DPO": {"ref_model": llama(dtype)}, "GRPO": {"reward_funcs": reward}}[kind]
    data = dataset(kind, vocabulary=24, length=5, count=16)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(kind, model, optimizer, data, device, given, output_dir=folder, **SETTINGS_OF[kind])
        torch.manual_seed(11)
        trainer.train()
    return [parameter.detach().clone() for parameter in trainer.model.parameters()], trainer.state.log_history


def distance(some: list[Tensor], others: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(some, others, strict=True))


def trains(device: torch.device, *, kind: str) -> str:
    """With the second pass at θ a run is the plain one bit for bit; with a penalty it is another, and every step has one."""
    needed("trl")
    ratios = []
    for dtype in (torch.float32, torch.bfloat16):  # of the weights; the passes run under bf16 autocast
        plain, _ = trained(kind, device, dtype, None)
        at_theta, _ = trained(kind, device, dtype, AT_THETA)
        regularized, log = trained(kind, device, dtype, PENALTY)
        if distance(at_theta, plain) > 0:  # kernels that add in no fixed order would explain it
            again, _ = trained(kind, device, dtype, None)
            noise = distance(again, plain)
            expect(
                distance(at_theta, plain) <= 2 * noise,
                f"a second pass at θ changes the run; two plain runs differ by {noise}",
            )
        expect(all(weight.isfinite().all() for weight in regularized), "weights are not finite")
        expect(distance(regularized, plain) > 0, "the penalty changed nothing")
        found = [entry["grad_reg/penalty_ratio"] for entry in log if "grad_reg/penalty_ratio" in entry]
        expect(len(found) == STEPS and min(found) > 0, f"penalty ratios in {STEPS} steps: {found}")
        ratios += found
    return f"‖penalty‖/‖g1‖ {min(ratios):.2g} to {max(ratios):.2g}"


CHECKS: dict[str, Check] = {kind: partial(trains, kind=kind) for kind in ("SFT", "GRPO", "DPO")}


def grpo_seconds(model: Any, device: torch.device, *, completions: int, tokens: int, steps: int) -> dict[str, Any]:
    """Seconds of GRPO steps that generate ``completions`` of ``tokens``: with and without the second pass, in turn.

    Every other step is regularized. The first two, which warm up and check the precision, do not count.
    """
    needed("trl")
    from transformers import TrainerCallback

    starts: list[float] = []
    seconds: list[float] = []

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            starts.append(now())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(now() - starts[-1])

    optimizer = GradRegOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True), every=2)
    data = dataset("GRPO", vocabulary=model.config.vocab_size, length=16, count=completions)
    given = {"reward_funcs": reward, "callbacks": [Clock()]}
    sizes = {"per_device_train_batch_size": completions, "num_generations": 4, "max_completion_length": tokens, "beta": 0.0}
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        more = {"output_dir": folder, "max_steps": steps, "logging_steps": 10 * steps, **sizes}
        make_trainer("GRPO", model, optimizer, data, device, given, **more).train()
    regularized, plain = (statistics.median(seconds[start::2]) for start in (2, 3))
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "completions": completions,
        "tokens": tokens,
        "seconds": seconds,
        "regularized": regularized,
        "plain": plain,
        "ratio": regularized / plain,
    }
