"""Trainers of every kind around a random two-layer Llama, small enough for a step to take a few milliseconds."""

import gc
import os

import pytest
import torch

pytest.importorskip("trl", reason="trainers come with the extra [trl]")

from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.optim import AdamW
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer

from gradreg_optim import GradRegOptimizer

# Accelerate collects garbage at the beginning of every train(); what was imported once need not be
# looked at each time.
gc.collect()
gc.freeze()

SPECIAL = ["<pad>", "<eos>", "<unk>"]
WORDS = [f"w{i}" for i in range(21)]
KINDS = {
    "sft": (SFTTrainer, SFTConfig),
    "dpo": (DPOTrainer, DPOConfig),
    "grpo": (GRPOTrainer, GRPOConfig),
    "rloo": (RLOOTrainer, RLOOConfig),
}
PLAIN = {
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "max_steps": 3,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "seed": 7,
}
UNCLIPPED = {"g1_clip": None, "g2_clip": None}
UNCHECKED = {"check_every": 0}  # else the first step has two passes more
AT_THETA = {"strength": 1e-30, "eps": 1e-30, **UNCLIPPED, **UNCHECKED}
"""A step too short to move a float32 weight, and γ = ε, which makes g2 the combined gradient.

With the second pass at θ itself, training is plain training bit for bit, if that pass sees what the first one
saw and leaves nothing behind.
"""
at_theta = pytest.mark.filterwarnings("ignore:Gradient regularization. 0 of the step to")
"""Of modules with such steps, of which nothing arrives in the weights."""
REAL = {"strength": 0.05, "eps": 0.01, "norm_of": "step", "resample": "reuse", **UNCLIPPED, **UNCHECKED}
OF_MICRO_BATCHES = {**REAL, "norm_of": "micro_batch"}
"""A penalty that can be seen."""

every_kind = pytest.mark.parametrize("kind", KINDS)


def first_passes(kind):
    """The passes of the first step: GRPO's loss is not the integral of its gradient, which the last one twice finds out."""
    return 3 if kind == "grpo" else 2


def tokenizer():
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    inputs = ["input_ids", "attention_mask"]  # transformers 4.57 adds token types, which Llama does not take
    return PreTrainedTokenizerFast(tokenizer_object=words, model_input_names=inputs, **special)


def llama(seed=0, **settings):
    torch.manual_seed(seed)
    defaults = {
        "vocab_size": len(SPECIAL + WORDS),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,  # far enough from uniform predictions for the curvature to be felt
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    return LlamaForCausalLM(LlamaConfig(**{**defaults, **settings}))


def sentence(seed, length):
    numbers = torch.randint(len(WORDS), (length,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[i] for i in numbers)


def dataset(kind, count=16):
    """Sequences of unequal lengths: equal weight to every token and to every micro-batch are different losses."""
    if kind == "sft":
        return Dataset.from_dict({"text": [sentence(i, 4 + i % 5) for i in range(count)]})
    columns = {"prompt": [sentence(i, 3) for i in range(count)]}
    if kind == "dpo":
        for seed, name in ((100, "chosen"), (200, "rejected")):
            columns[name] = [" " + sentence(seed + i, 2 + (seed // 100 * i) % 4) for i in range(count)]
    return Dataset.from_dict(columns)


class Reward:
    """Rewards a completion by its words; ``scored`` counts completions."""

    __name__ = "reward"

    def __init__(self):
        self.scored = 0

    def __call__(self, completions, **_):
        self.scored += len(completions)
        return [len(set(completion.split())) % 5 + len(completion) % 3 / 4 for completion in completions]


def adamw(model):
    return AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)


def build(
    kind,
    folder,
    *,
    model=None,
    base=adamw,
    wrapped=None,
    trainer_class=None,
    count=16,
    eval_dataset=None,
    **arguments,
):
    """A trainer with ``base(model)`` as its optimizer, inside a ``GradRegOptimizer(**wrapped)`` if that is given."""
    # Transformers 4.57 leaves the precision of a bf16 run in the environment, where the next run finds it.
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    model = llama() if model is None else model
    optimizer = None if base is None else base(model)
    if wrapped is not None:
        optimizer = GradRegOptimizer(optimizer, **wrapped)
    extra = {name: arguments.pop(name) for name in ("callbacks", "peft_config") if name in arguments}
    defaults = {**PLAIN, "output_dir": str(folder)}
    if kind in ("grpo", "rloo"):
        extra["reward_funcs"] = arguments.pop("reward", None) or Reward()
        defaults |= {"num_generations": 2, "max_completion_length": 6, "beta": 0.0}
    if kind == "dpo":
        extra["ref_model"] = llama(seed=1)
    default_class, config_class = KINDS[kind]
    trainer = (trainer_class or default_class)(
        model=model,
        args=config_class(**{**defaults, **arguments}),
        train_dataset=dataset(kind, count),
        eval_dataset=eval_dataset,
        processing_class=tokenizer(),
        optimizers=(optimizer, None),
        **extra,
    )
    # Training starts from the same random numbers, however much building the trainer drew.
    torch.manual_seed(11)
    return trainer


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same(one, other):
    """Two dictionaries of tensors are equal bit for bit."""
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def own_figures(trainer):
    """The trainer's log without what depends on the clock or comes from the attachment."""
    clocks = ("runtime", "per_second", "step_time")
    return [
        {key: value for key, value in entry.items() if not key.startswith("grad_reg/") and not key.endswith(clocks)}
        for entry in trainer.state.log_history
    ]


def penalties(trainer, name):
    """The values of ``grad_reg/<name>`` over the log."""
    key = f"grad_reg/{name}"
    return [entry[key] for entry in trainer.state.log_history if key in entry]


class Spy:
    """Stands before ``trainer.compute_loss`` and keeps what it is given and what it returns for a gradient."""

    def __init__(self, trainer):
        self.inputs, self.losses, self.addresses, self.boundaries = [], [], [], []
        self.is_paused = False
        compute_loss = trainer.compute_loss

        def spy(model, inputs, *args, **kwargs):
            # Evaluation, and the check that a loss can be repeated.
            if self.is_paused or not torch.is_grad_enabled():
                return compute_loss(model, inputs, *args, **kwargs)
            tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
            self.inputs.append({name: value.clone() for name, value in tensors.items()})
            self.addresses.append([value.data_ptr() for value in tensors.values()])
            self.boundaries.append(trainer.accelerator.sync_gradients)
            loss = compute_loss(model, inputs, *args, **kwargs)
            self.losses.append(loss.detach().clone())
            return loss

        trainer.compute_loss = spy
