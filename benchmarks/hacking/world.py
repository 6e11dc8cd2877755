"""What the runs of a seed share: the initial policy, trained by TRL's SFTTrainer, and the reward."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    set_seed,
)
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from benchmarks.hacking.language import corpus, golds, request, tokenizer
from benchmarks.hacking.rewards import REWARDS, Judge, Loophole, Proxy, Reward


@dataclass(frozen=True)
class Scale:
    """Sizes, and all other settings that change the outcome of a run, except its arm and its seed.

    ``reward`` is one of ``REWARDS``; ``scale_rewards`` is GRPOConfig's.
    """

    policy_width: int = 64
    policy_layers: int = 2
    proxy_width: int = 32
    proxy_layers: int = 2
    corpus_size: int = 4096
    sft_steps: int = 300
    pairs: int = 3000
    label_noise: float = 0.2
    proxy_steps: int = 300
    reward: str = "learned"
    scale_rewards: str = "group"
    answer_tokens: int = 20
    steps: int = 120
    measure_every: int = 10
    prompts_per_step: int = 8
    generations: int = 8
    learning_rate: float = 2e-4
    measured_prompts: int = 64
    measured_answers: int = 4


COMMON: dict[str, Any] = {
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "logging_steps": 50,
    "dataloader_pin_memory": False,
    "save_strategy": "no",
}

FROM_SCRATCH: dict[str, Any] = {
    **COMMON,
    "per_device_train_batch_size": 64,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine",
}
"""How policy and proxy are trained."""


def config(width: int, layers: int, **settings: Any) -> LlamaConfig:
    """A small Llama for the language."""
    words = tokenizer()
    return LlamaConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=words.pad_token_id,
        bos_token_id=None,
        eos_token_id=words.eos_token_id,
        **settings,
    )


def train_policy(scale: Scale, seed: int, folder: Path) -> LlamaForCausalLM:
    """A language model of the corpus, trained from scratch."""
    set_seed(seed)
    policy = LlamaForCausalLM(config(scale.policy_width, scale.policy_layers))
    trainer = SFTTrainer(
        model=policy,
        args=SFTConfig(str(folder / "sft"), max_steps=scale.sft_steps, seed=seed, **FROM_SCRATCH),
        train_dataset=Dataset.from_list(corpus(scale.corpus_size, seed)),
        processing_class=tokenizer(),
    )
    trainer.train()
    return policy


@torch.no_grad()
def sample(policy: PreTrainedModel, prompts: Sequence[str], answer_tokens: int) -> tuple[Tensor, list[str]]:
    """Sample answers. Returns the ids (answers, tokens) of prompts and answers, and the answers."""
    words = tokenizer()
    inputs = words(list(prompts), return_tensors="pt")  # all have the same length
    was_training = policy.training
    policy.eval()
    ids = policy.generate(
        **inputs, do_sample=True, top_k=0, max_new_tokens=answer_tokens, pad_token_id=words.pad_token_id
    )
    policy.train(was_training)
    answers = ids[:, inputs["input_ids"].shape[1] :]
    return ids, words.batch_decode(answers, skip_special_tokens=True)


def drawn_pairs(policy: PreTrainedModel, scale: Scale, count: int, seed: int) -> list[dict[str, str]]:
    """Pairs of answers to the same request, ordered by gold. Two answers of the same gold make no pair."""
    draw, pairs = random.Random(seed), []
    torch.manual_seed(seed)
    while len(pairs) < count:
        prompts = [request(draw) for _ in range(256)]
        _, texts = sample(policy, [prompt for prompt in prompts for _ in (0, 1)], scale.answer_tokens)
        for prompt, one, other in zip(prompts, texts[::2], texts[1::2], strict=True):
            worth = golds((prompt, prompt), (one, other))
            if worth[0] != worth[1]:
                chosen, rejected = (one, other) if worth[0] > worth[1] else (other, one)
                pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return pairs[:count]


def train_proxy(
    policy: PreTrainedModel, scale: Scale, seed: int, folder: Path
) -> LlamaForSequenceClassification:
    """A Bradley-Terry model of pairs of the policy's answers, some of them labelled the wrong way round."""
    draw = random.Random(seed)
    pairs = drawn_pairs(policy, scale, scale.pairs, seed + 1)
    noisy = [
        {**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]}
        if draw.random() < scale.label_noise
        else pair
        for pair in pairs
    ]
    set_seed(seed)
    proxy = LlamaForSequenceClassification(config(scale.proxy_width, scale.proxy_layers, num_labels=1))
    trainer = RewardTrainer(
        model=proxy,
        args=RewardConfig(str(folder / "proxy"), max_steps=scale.proxy_steps, seed=seed, **FROM_SCRATCH),
        train_dataset=Dataset.from_list(noisy),
        processing_class=tokenizer(),
    )
    trainer.train()
    return proxy


@dataclass
class World:
    """The start of a seed's runs: the folder of the policy, the reward, and how often that is right."""

    folder: Path
    proxy: Reward
    accuracy: float

    def policy(self) -> LlamaForCausalLM:
        """A new copy of the initial policy."""
        return LlamaForCausalLM.from_pretrained(self.folder / "policy")


def prepare(scale: Scale, seed: int, folder: Path) -> World:
    """The world of a seed; built if ``folder`` does not hold it."""
    record = folder / "world.json"
    if not record.exists():
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "policy").exists():  # it may be that of another reward, which does not change it
            train_policy(scale, 1000 * seed, folder).save_pretrained(folder / "policy")
        policy = LlamaForCausalLM.from_pretrained(folder / "policy")
        tokenizer().save_pretrained(folder / "policy")
        known: dict[str, float] = {"seed": seed}
        unseen = drawn_pairs(policy, scale, max(64, scale.pairs // 3), 1000 * seed + 200)
        sides = [[pair[side] for pair in unseen] for side in ("chosen", "rejected")]
        prompts = [pair["prompt"] for pair in unseen]
        if scale.reward != "loophole":
            proxy = train_proxy(policy, scale, 1000 * seed + 100, folder)
            proxy.save_pretrained(folder / "proxy")
            scores = Proxy(proxy)(prompts * 2, sides[0] + sides[1])
            known |= {"centre": fmean(scores), "spread": pstdev(scores)}
        better, worse = (reward(scale, folder, known)(prompts, side) for side in sides)
        right = sum((one > other) + 0.5 * (one == other) for one, other in zip(better, worse, strict=True))
        record.write_text(json.dumps({**known, "proxy_accuracy": right / len(unseen)}) + "\n")
    known = json.loads(record.read_text())
    return World(folder, reward(scale, folder, known), known["proxy_accuracy"])


def reward(scale: Scale, folder: Path, known: dict[str, float]) -> Reward:
    """The reward that the scale names.

    Raises:
        ValueError: there is no such reward.
    """
    if scale.reward not in REWARDS:
        raise ValueError(f"--reward {scale.reward}: must be one of {', '.join(REWARDS)}")
    if scale.reward == "loophole":
        return Loophole()
    learned = Proxy(LlamaForSequenceClassification.from_pretrained(folder / "proxy"))
    return learned if scale.reward == "learned" else Judge(learned, known["centre"], known["spread"])


def scale_fields() -> dict[str, type]:
    """The names and types of a scale's settings."""
    return {field.name: type(field.default) for field in fields(Scale)}
