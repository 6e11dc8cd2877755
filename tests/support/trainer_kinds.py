"""Each trainer of Transformers and TRL, where the installed version keeps it, with what it insists on being given."""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
import transformers
import trl
from datasets import Dataset
from trainers import PLAIN, Reward, adamw, llama, sentence, tokenizer
from transformers import LlamaConfig, LlamaForSequenceClassification, LlamaForTokenClassification

from gradreg_optim import GradRegOptimizer

COUNT = 8
SAMPLING = {"max_completion_length": 6}
GROUPS = {**SAMPLING, "num_generations": 2, "beta": 0.0}
LIMITED = {"max_length": 32}
ONLINE = {**LIMITED, "max_new_tokens": 6}


def texts(first_seed, *, length=3, vary=False):
    """Sentences to fill a column, of one length or of several."""
    return [" " + sentence(first_seed + i, length + vary * (i % 3)) for i in range(COUNT)]


def chats():
    pairs = zip(texts(0), texts(100, vary=True), strict=True)
    return [[{"role": "user", "content": question}, {"role": "assistant", "content": answer}] for question, answer in pairs]


def token_ids():
    return [tokenizer()(text)["input_ids"] for text in texts(0)]


def columns():
    """Every column that some trainer asks for."""
    return {
        "text": texts(0, length=4, vary=True),
        "prompt": texts(0),
        "chosen": texts(100, vary=True),
        "rejected": texts(200, vary=True),
        "reference": texts(300, vary=True),
        "completion": texts(100, vary=True),
        "privileged_context": texts(100),
        "label": [True, False] * (COUNT // 2),
        "messages": chats(),
        "input_ids": token_ids(),
        "labels": [0.0, 1.0] * (COUNT // 2),
    }


def dataset(names):
    if "completions" in names:  # of several steps, each with a label
        steps = [list(pair) for pair in zip(texts(100), texts(200), strict=True)]
        return Dataset.from_dict({"prompt": texts(0), "completions": steps, "labels": [[True, False]] * COUNT})
    return Dataset.from_dict({name: values for name, values in columns().items() if name in names})


def scorer(seed=0):
    """The Llama of the other trainers, with one score instead of words."""
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(LlamaConfig(**{**llama().config.to_diff_dict(), "num_labels": 1}))


def step_scorer():
    """The same with two classes for every token."""
    torch.manual_seed(0)
    return LlamaForTokenClassification(LlamaConfig(**{**llama().config.to_diff_dict(), "num_labels": 2}))


def chatting_tokenizer():
    words = tokenizer()
    words.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return words


class Judge:
    """Prefers the shorter completion; ``judged`` counts pairs."""

    def __init__(self):
        self.judged = 0

    def judge(self, prompts, completions, shuffle_order=True, return_scores=False):
        self.judged += len(prompts)
        shorter = [len(first) <= len(second) for first, second in completions]
        return [0.25 + 0.5 * first for first in shorter] if return_scores else [int(not first) for first in shorter]


def reference():
    return {"ref_model": llama(seed=1)}


def teacher():
    return {"teacher_model": llama(seed=1)}


def rewarded():
    return {"reward_funcs": Reward()}


def judged():
    return {"judge": Judge(), **reference()}


def actors():
    return {
        **reference(),
        "reward_model": scorer(1),
        "value_model": scorer(2),
        "eval_dataset": dataset(["input_ids"]),
    }


@dataclass
class Kind:
    """A trainer's module, dataset columns, settings and other arguments, made anew each time.

    ``stored``: it loads a teacher, or the teacher's tokenizer, from where its models say that they came from.
    ``class_name``: the trainer's own name, where another one has the same.
    """

    module: str
    columns: list[str]
    settings: dict[str, Any] = field(default_factory=dict)
    given: Callable[[], dict[str, Any]] = dict
    model: Callable[[], Any] = llama
    tokenizer: Callable[[], Any] = tokenizer
    stored: bool = False
    class_name: str | None = None


WHOLE_TOKENS = {} if trl.__version__ < "1" else {"use_extended_uld": False}
"""GOLD in trl 1 splits tokens into bytes, which only tokenizers made of bytes allow."""
PAIR = ["prompt", "chosen", "rejected"]
LABELLED = ["prompt", "completion", "label"]
KINDS = {
    "Trainer": Kind("transformers", ["input_ids", "labels"], model=scorer),
    "Seq2SeqTrainer": Kind("transformers", ["input_ids", "labels"], model=scorer),
    "SFTTrainer": Kind("trl", ["text"]),
    "DPOTrainer": Kind("trl", PAIR, given=reference),
    "GRPOTrainer": Kind("trl", ["prompt"], GROUPS, rewarded),
    "RLOOTrainer": Kind("trl", ["prompt"], GROUPS, rewarded),
    "KTOTrainer": Kind("kto", LABELLED, given=reference),
    "RewardTrainer": Kind("trl", ["chosen", "rejected"], model=scorer),
    "DistillationTrainer": Kind("trl", ["prompt"], SAMPLING, teacher),
    "CPOTrainer": Kind("cpo", PAIR),
    "ORPOTrainer": Kind("orpo", PAIR, LIMITED),
    "BCOTrainer": Kind("bco", LABELLED, LIMITED, reference),
    "PRMTrainer": Kind("prm", ["prompt", "completions", "labels"], LIMITED, model=step_scorer),
    "GKDTrainer": Kind("gkd", ["messages"], {**LIMITED, "max_new_tokens": 4}, teacher, tokenizer=chatting_tokenizer),
    "GMPOTrainer": Kind("gmpo", ["prompt"], GROUPS, rewarded),
    "TPOTrainer": Kind("tpo", [*PAIR, "reference"]),
    "SDFTTrainer": Kind(
        "sdft",
        ["prompt", "privileged_context"],
        {**SAMPLING, "num_generations": 2, "num_loss_tokens_to_skip": 0, "distillation_topk": 8},
        stored=True,
    ),
    "live SDFTTrainer": Kind(  # its teacher is the student itself, at θ' as well
        "sdft",
        ["prompt", "privileged_context"],
        {
            **SAMPLING,
            "num_generations": 2,
            "num_loss_tokens_to_skip": 0,
            "distillation_topk": 8,
            "teacher_model_kind": "live",
        },
        stored=True,
        class_name="SDFTTrainer",
    ),
    "SDPOTrainer": Kind(
        "sdpo",
        ["prompt", "privileged_context"],
        {**SAMPLING, "num_generations": 2, "distillation_topk": 8},
        rewarded,
        stored=True,
    ),
    "GOLDTrainer": Kind(
        "gold", ["messages"], {**LIMITED, **SAMPLING, **WHOLE_TOKENS}, teacher, tokenizer=chatting_tokenizer
    ),
    "IWOPDTrainer": Kind(
        "iw_opd", ["messages"], {**LIMITED, **SAMPLING}, teacher, tokenizer=chatting_tokenizer, stored=True
    ),
    "MiniLLMTrainer": Kind("minillm", ["prompt"], GROUPS, teacher),
    "GRPOWithReplayBufferTrainer": Kind("grpo_with_replay_buffer", ["prompt"], GROUPS, rewarded),
    "GSPOTokenTrainer": Kind(
        "gspo_token",
        ["prompt"],
        {**GROUPS, "importance_sampling_level": "sequence_token"},
        rewarded,
        class_name="GRPOTrainer",
    ),
    "A2POTrainer": Kind("a2po", ["prompt"], {**SAMPLING, "filter_all_incorrect": False}, rewarded),
    "OnlineDPOTrainer": Kind("online_dpo", ["prompt"], ONLINE, rewarded),
    "NashMDTrainer": Kind("nash_md", ["prompt"], ONLINE, judged),
    "XPOTrainer": Kind("xpo", ["prompt"], ONLINE, judged),
    "PPOTrainer": Kind(
        "ppo",
        ["input_ids"],
        {"response_length": 4, "num_ppo_epochs": 1, "num_mini_batches": 1, "num_sample_generations": 0},
        actors,
    ),
}


ELSEWHERE = {"AsyncGRPOTrainer": "test_vllm_hooks.py"}
"""Trainers that run with stand-ins for what a CPU has not, in tests of their own."""
NOT_RUN = {
    "AsyncDistillationTrainer": (
        "takes completions from a vLLM server of the student's and scores from one of the teacher's"
    ),
    "ServerDistillationTrainer": "takes the teacher's scores from a server",
    "GFPOTrainer": "fails by itself in trl 0.27.2: its generation unpacks fewer values than GRPO's returns",
    "PAPOTrainer": "trains vision-language models only; a GRPO loss",
}
"""Trainers of the experimental part of either generation that are not in the matrix, and why."""


def find(name):
    """The trainer's class and its configuration's; ``None`` where the installed version has none."""
    module, name = KINDS[name].module, KINDS[name].class_name or name
    if module == "transformers":
        return getattr(transformers, name), getattr(transformers, f"{name.removesuffix('Trainer')}TrainingArguments")
    experimental = f"trl.experimental.{module}"
    promoted = module == "trl" or (module == "kto" and trl.__version__ >= "1")
    where = trl if promoted else importlib.import_module(experimental) if importlib.util.find_spec(experimental) else None
    if not hasattr(where, name):
        return None
    config = name.replace("Trainer", "Config")
    return getattr(where, name), getattr(where if hasattr(where, config) else trl, config)


def build_kind(name, folder, *, wrapped=None, **arguments):
    """A trainer of that name over two steps, with AdamW, inside a ``GradRegOptimizer(**wrapped)`` if that is given."""
    kind, (trainer_class, config_class) = KINDS[name], find(name)
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # as in trainers.build
    model = kind.model()
    given = kind.given()
    if kind.stored:
        llama(seed=1).save_pretrained(folder)
        kind.tokenizer().save_pretrained(folder)
        for stored in (model, *given.values()):
            if hasattr(stored, "config"):
                stored.config._name_or_path = str(folder)
    optimizer = adamw(model)
    if wrapped is not None:
        optimizer = GradRegOptimizer(optimizer, **wrapped)
    trainer = trainer_class(
        model=model,
        args=config_class(**{**PLAIN, "max_steps": 2, "output_dir": str(folder), **kind.settings, **arguments}),
        train_dataset=dataset(kind.columns),
        processing_class=kind.tokenizer(),
        optimizers=(optimizer, None),
        **given,
    )
    torch.manual_seed(11)
    return trainer
