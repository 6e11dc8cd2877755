"""One run: GRPO from the initial policy of a seed against its reward, with measurements of the policy."""

from __future__ import annotations

import json
import os
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.hacking.arms import Arm, Run
from benchmarks.hacking.language import golds, request
from benchmarks.hacking.rewards import agreement
from benchmarks.hacking.world import COMMON, Scale, World, sample, tokenizer
from gradreg_optim import attach

FIGURES = (
    "strength",
    "g1_norm",
    "penalty_ratio",
    "curvature",
    "cosine",
    "perturbation_fidelity",
    "self_check",
    "radius",
)
"""The metrics of the wrapper that a run keeps, averaged between two measurements."""


@dataclass
class PolicyMeter:
    """Measures gold, proxy and KL from the start, with the same requests and random numbers each time."""

    world: World
    scale: Scale
    seed: int

    def __post_init__(self) -> None:
        draw = random.Random(self.seed)
        distinct = [request(draw) for _ in range(self.scale.measured_prompts)]
        self.prompts = [prompt for prompt in distinct for _ in range(self.scale.measured_answers)]
        self.start = self.world.policy().eval()

    @torch.no_grad()
    def __call__(self, policy: PreTrainedModel) -> dict[str, Any]:
        with torch.random.fork_rng(devices=[]):  # leave the random numbers of the training alone
            torch.manual_seed(self.seed)
            ids, texts = sample(policy, self.prompts, self.scale.answer_tokens)
        scores = self.world.proxy(self.prompts, texts)
        return {
            "proxy": fmean(scores),
            "gold": fmean(golds(self.prompts, texts)),
            "kl": self.divergence(policy, ids),
            "proxy_accuracy": agreement(self.prompts, texts, scores),
            "tokens": fmean(len(text) for text in texts),
            "example": self.prompts[0] + texts[0],
        }

    @torch.no_grad()
    def divergence(self, policy: PreTrainedModel, ids: Tensor) -> float:
        """KL(policy ‖ start) of an answer in nats: exact for each next token, summed over its tokens."""
        asked, end = len(self.prompts[0]), tokenizer().eos_token_id
        written = ids[:, asked:]
        ended = (written == end).long().cumsum(1)
        counted = (ended - (written == end).long()) == 0  # up to the end token, that included
        was_training = policy.training
        policy.eval()
        log_p, log_q = (
            model(input_ids=ids).logits[:, asked - 1 : -1].float().log_softmax(-1)
            for model in (policy, self.start)
        )
        policy.train(was_training)
        return float(((log_p.exp() * (log_p - log_q)).sum(-1) * counted).sum(1).mean())


class Course(TrainerCallback):
    """Measures the policy every few steps, and adds the wrapper's metrics since the last measurement."""

    def __init__(self, meter: PolicyMeter, every: int) -> None:
        self.meter, self.every = meter, every
        self.curve: list[dict[str, Any]] = []
        self.seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._measure(0, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._measure(state.global_step, model)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and self.curve and self.curve[-1]["step"] == state.global_step:
            found = {name: logs.get(f"grad_reg/{name}") for name in FIGURES}
            self.curve[-1] |= {name: value for name, value in found.items() if value is not None}

    def _measure(self, step: int, model: Any) -> None:
        start = time.perf_counter()
        self.curve.append({"step": step, **self.meter(model)})
        self.seconds += time.perf_counter() - start


def train(arm: Arm, world: World, scale: Scale, seed: int, folder: Path) -> Run:
    """Run an arm on a seed."""
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # transformers 4.57 leaves that of an earlier run
    torch.manual_seed(1000 * seed + 300)
    draw = random.Random(1000 * seed + 300)
    policy = arm.prepared(world.policy())
    # The trainer loads the reference of its KL penalty from here.
    policy.config._name_or_path = str(world.folder / "policy")
    rate = scale.learning_rate * arm.rate
    adamw = torch.optim.AdamW(policy.parameters(), lr=rate, weight_decay=0.0)
    # A check takes two gradients more, and without shrink it does not change training.
    checks = {"check_every": scale.measure_every, "shrink": False}
    meter = PolicyMeter(world, scale, 1000 * seed + 400)
    answers = scale.prompts_per_step * scale.generations
    micro_batch = min(arm.micro_batch or answers, answers)
    trainer = GRPOTrainer(
        model=policy,
        reward_funcs=world.proxy,
        args=GRPOConfig(
            str(folder),
            **COMMON
            | {
                "max_steps": scale.steps,
                "learning_rate": rate,
                "lr_scheduler_type": "constant",
                "per_device_train_batch_size": micro_batch,
                "gradient_accumulation_steps": answers // micro_batch,
                "num_generations": scale.generations,
                "max_completion_length": scale.answer_tokens,
                "logging_steps": scale.measure_every,
                "scale_rewards": scale.scale_rewards,
                "seed": 1000 * seed + 300,
            }
            | arm.trainer,
        ),
        train_dataset=Dataset.from_list([{"prompt": request(draw)} for _ in range(512)]),
        processing_class=tokenizer(),
        optimizers=(arm.optimizer(adamw, model=policy, g1_clip=None, g2_clip=None, **checks), None),
    )
    if not arm.wrapper:
        attach(trainer)
    course = Course(meter, scale.measure_every)
    trainer.add_callback(course)
    start = time.perf_counter()
    trainer.train()
    seconds = (time.perf_counter() - start - course.seconds) / scale.steps
    return {"arm": asdict(arm), "seed": seed, "curve": course.curve, "seconds_per_step": seconds}


def run(arm: Arm, world: World, scale: Scale, seed: int, folder: Path) -> Run:
    """As ``train``, with the result kept in ``folder``. A run whose file exists is not repeated."""
    record = folder / f"{arm.name}-{seed}.json"
    if record.exists():
        return dict(json.loads(record.read_text()))
    result = train(arm, world, scale, seed, folder / "trainer")
    part = record.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(record)  # so that an interrupted run leaves no half-written file
    return result
