"""Trainers of every kind around a random two-layer Llama, small enough for a step to take a few milliseconds."""

import copy

import pytest
import torch

pytest.importorskip("trl", reason="trainers come with the extra [trl]")

from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback, TrainingArguments
from transformers import Trainer as PlainTrainer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer

from gradreg_optim import GradRegOptimizer, attach

SPECIAL = ["<pad>", "<eos>", "<unk>"]
WORDS = [f"w{i}" for i in range(21)]
KINDS = {
    "sft": (SFTTrainer, SFTConfig),
    "dpo": (DPOTrainer, DPOConfig),
    "grpo": (GRPOTrainer, GRPOConfig),
    "rloo": (RLOOTrainer, RLOOConfig),
}
WALL_CLOCK = ("runtime", "per_second", "step_time")

every_kind = pytest.mark.parametrize("kind", KINDS)


def tokenizer():
    vocabulary = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def llama(seed=0, **settings):
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": len(SPECIAL + WORDS),
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 64,
            "initializer_range": 0.3,  # logits far enough from uniform for curvature to be felt
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": 1,
            **settings,
        }
    )
    return LlamaForCausalLM(config)


def text(seed, length):
    numbers = torch.randint(len(WORDS), (length,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[i] for i in numbers)


def dataset(kind, count=10):
    """Sequences of unequal lengths, so that micro-batches of equal weight and tokens of equal weight differ."""
    if kind == "sft":
        return Dataset.from_dict({"text": [text(i, 4 + i % 5) for i in range(count)]})
    columns = {"prompt": [text(i, 3) for i in range(count)]}
    if kind == "dpo":
        for seed, name in ((100, "chosen"), (200, "rejected")):
            columns[name] = [" " + text(seed + i, 2 + (seed // 100 * i) % 4) for i in range(count)]
    return Dataset.from_dict(columns)


class Reward:
    """Rewards completions by a hash of their words; ``calls`` counts the completions that were scored."""

    __name__ = "reward"

    def __init__(self):
        self.calls = 0

    def __call__(self, completions, **_):
        self.calls += len(completions)
        return [(sum(map(len, completion.split())) * 7 + len(completion)) % 11 / 10 for completion in completions]


def build(kind, folder, *, model=None, wrapped=None, plain=False, trainer_class=None, data=None, callbacks=(), **arguments):
    """A trainer; with ``wrapped``, settings of a GradRegOptimizer that it gets as ``optimizers=``."""
    model = llama() if model is None else model
    defaults = {
        "output_dir": str(folder),
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 7,
    }
    extra = {"processing_class": tokenizer()}
    if kind in ("grpo", "rloo"):
        defaults |= {"num_generations": 2, "max_completion_length": 6}
        extra["reward_funcs"] = arguments.pop("reward", None) or Reward()
    if kind == "dpo":
        extra["ref_model"] = llama(seed=1)
    default_class, config_class = KINDS[kind]
    optimizers = (None, None)
    if wrapped is not None:
        base = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
        optimizers = (GradRegOptimizer(base, **wrapped), None)
    elif plain:
        optimizers = (torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01), None)
    return (trainer_class or default_class)(
        model=model,
        args=config_class(**{**defaults, **arguments}),
        train_dataset=dataset(kind) if data is None else data,
        optimizers=optimizers,
        callbacks=list(callbacks),
        **extra,
    )
