"""Real trainers: arms for the reward-hacking runs, and the seconds of a step."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.cost.measuring import quartiles
from gradreg_optim import GradRegOptimizer

WHOLE = "whole"


def arms() -> dict[str, Any]:
    """The arm that the reward-hacking benchmark chose (GR sequence, strength 1) on four micro-batches, and cheaper ones."""
    from benchmarks.hacking.arms import EPS, Arm

    changed: dict[str, dict[str, Any]] = {
        WHOLE: {},
        "fraction-0.25": {"fraction": 0.25},
        "fraction-0.5": {"fraction": 0.5},
        "every-4-plain": {"every": 4},
        "every-4-plain-4": {"every": 4, "strength": 4.0},
    }
    made = {}
    for name, settings in changed.items():
        wrapper = {"strength": 1.0, "eps": EPS, "resample": "sequence", "check_every": 0, **settings}
        trainer = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 4}
        made[name] = Arm(name, wrapper, trainer)
    return made


COLUMNS = ("whole step", "without generation", "without generation, processor")
"""Wall-clock seconds, and processor seconds, which other programs on the machine influence less."""


class Turns:
    """Lets a trainer take one step with each of the settings in turn, and measures the time of each step."""

    def __init__(self, settings: dict[str, dict[str, float]], optimizer: GradRegOptimizer) -> None:
        self.settings, self.optimizer, self.count = list(settings.items()), optimizer, 0
        self.seconds: dict[str, list[tuple[float, ...]]] = {name: [] for name in settings}

    def begin(self) -> None:
        """Call this before a step."""
        _, given = self.settings[self.count % len(self.settings)]
        for group in self.optimizer.param_groups:
            group.update({f"gradreg_{key}": value for key, value in given.items()})
        self.generation, self.start = np.zeros(2), now()

    def end(self) -> None:
        """Call this after a step."""
        whole = now() - self.start
        rest = whole - self.generation
        self.seconds[self.settings[self.count % len(self.settings)][0]].append((whole[0], rest[0], rest[1]))
        self.count += 1

    def generates(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        """``generate``, with its time counted as that of generation."""

        def timed(*inputs: Any) -> Any:
            start = now()
            found = generate(*inputs)
            self.generation += now() - start
            return found

        return timed


def now() -> Any:
    """Wall-clock and processor seconds."""
    return np.array([time.perf_counter(), time.process_time()])


SETTINGS = {
    "plain": {"strength": 0.0, "fraction": 1.0},
    "fraction=1/4": {"strength": 1e-3, "fraction": 0.25},
    "fraction=1/2": {"strength": 1e-3, "fraction": 0.5},
    "all": {"strength": 1e-3, "fraction": 1.0},
}


def seconds_in_trainer(kind: str, rounds: int, width: int, folder: Path) -> dict[str, Any]:
    """Time relative to a plain step, at accumulation 4: SFT on 4 × 512 tokens, or GRPO on 4 × 8 completions."""
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

    from benchmarks.hacking.language import tokenizer
    from benchmarks.hacking.world import COMMON

    torch.manual_seed(0)
    words = tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=10,
            num_attention_heads=4,
            tie_word_embeddings=True,
            pad_token_id=words.pad_token_id,
            bos_token_id=None,
            eos_token_id=words.eos_token_id,
        )
    )
    common = {
        **COMMON,
        "max_steps": (rounds + 1) * len(SETTINGS),  # the first round is for warm-up
        "learning_rate": 1e-6,
        "gradient_accumulation_steps": 4,
        "logging_steps": 10**6,
    }
    optimizer = GradRegOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-6), radius=0.0025, model=model)
    turns = Turns(SETTINGS, optimizer)
    given: dict[str, Any] = {"model": model, "processing_class": words, "optimizers": (optimizer, None)}
    if kind == "SFT":
        rows = torch.randint(5, 4096, (64, 128)).tolist()
        args = SFTConfig(str(folder), **common, per_device_train_batch_size=4, max_length=128)
        trainer: Any = SFTTrainer(args=args, train_dataset=Dataset.from_list([{"input_ids": row} for row in rows]), **given)
    else:
        args = GRPOConfig(str(folder), **common, per_device_train_batch_size=8, num_generations=8, max_completion_length=48)
        trainer = GRPOTrainer(
            args=args,
            reward_funcs=lambda completions, **_: [float(len(set(text)) % 7) for text in completions],
            train_dataset=Dataset.from_list([{"prompt": "1?" * 8}] * 64),
            **given,
        )
        trainer._generate_and_score_completions = turns.generates(trainer._generate_and_score_completions)

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turns.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.end()

    trainer.add_callback(Clock())
    trainer.train()
    found: dict[str, Any] = {
        "kind": kind,
        "parameters": sum(p.numel() for p in model.parameters()),
        "rounds": rounds,
        "rows": {},
    }
    plain = turns.seconds["plain"][1:]
    for name, times in turns.seconds.items():
        found["rows"][name] = {
            column: {
                "seconds": median(own[at] for own in times[1:]),
                "ratio": quartiles([own[at] / base[at] for own, base in zip(times[1:], plain, strict=True)]),
            }
            for at, column in enumerate(COLUMNS)
        }
    return found
