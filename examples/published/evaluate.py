r"""Measure a checkpoint on held-out prompts: mean rewards with their standard errors, written to a file.

After ``llm_judge.py``, the format, the judge's grade and correctness on the test problems::

    python -m examples.published.evaluate --model runs/llm_judge --judge Qwen/Qwen2.5-1.5B-Instruct

After ``rlhf.py``, the score of the reward model, and of another one that the policy was not trained against::

    python -m examples.published.evaluate --model runs/rlhf --dataset_config "" \
        --dataset_name trl-lib/ultrafeedback-prompt \
        --reward_models Skywork/Skywork-Reward-V2-Qwen3-0.6B Skywork/Skywork-Reward-V2-Qwen3-1.7B
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed

from examples.grpo.flags import InputError
from examples.published.judge import SYSTEM_PROMPT, correctness, format_reward
from examples.published.llm_judge import JudgeArguments, load_judge
from examples.published.loading import load_rows
from examples.published.rlhf import load_reward_model


@dataclass
class EvaluationArguments:
    """The checkpoint, the prompts and the rewards."""

    model: str = field(metadata={"help": "The checkpoint: a folder, or a model of the Hub."})
    output: str | None = field(
        default=None, metadata={"help": "The file to write. Default: evaluation.json in the folder."}
    )
    judge: str | None = field(
        default=None, metadata={"help": "A language model that grades, as in llm_judge.py."}
    )
    reward_models: list[str] = field(default_factory=list, metadata={"help": "Reward models, as in rlhf.py."})
    dataset_name: str = field(default="openai/gsm8k", metadata={"help": "As in llm_judge.py and rlhf.py."})
    dataset_config: str = field(default="main", metadata={"help": "Its configuration; empty for none."})
    dataset_split: str = field(default="test", metadata={"help": "The held-out split."})
    prompt_column: str = field(
        default="prompt", metadata={"help": "The column of prompts, where there are no questions."}
    )
    limit: int = field(default=512, metadata={"help": "Prompts to use, from the beginning."})
    batch_size: int = field(default=16, metadata={"help": "Prompts at a time."})
    max_completion_length: int = field(default=768, metadata={"help": "Tokens to generate."})
    temperature: float = field(default=1.0, metadata={"help": "Of sampling; 0 takes the most likely token."})
    seed: int = field(default=0, metadata={"help": "Seed of sampling."})


def as_text(tokenizer: Any, prompt: Any) -> str:
    """A prompt in the form in which the policy was trained on it."""
    if isinstance(prompt, str):
        return prompt
    return str(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))


@torch.no_grad()
def complete(model: Any, tokenizer: Any, prompts: list[str], own: EvaluationArguments) -> list[str]:
    """One completion for each prompt."""
    completions: list[str] = []
    sampling = (
        {"do_sample": True, "temperature": own.temperature} if own.temperature else {"do_sample": False}
    )
    for start in tqdm(range(0, len(prompts), own.batch_size), desc="generate", disable=None):
        inputs = tokenizer(prompts[start : start + own.batch_size], return_tensors="pt", padding=True).to(
            model.device
        )
        inputs.pop("token_type_ids", None)
        length = {"max_new_tokens": own.max_completion_length, "pad_token_id": tokenizer.pad_token_id}
        produced = model.generate(**inputs, **sampling, **length)
        completions += tokenizer.batch_decode(
            produced[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
    return completions


@torch.no_grad()
def scores(name: str, texts: list[str], own: EvaluationArguments, device: Any) -> list[float]:
    """A reward model's score of each text."""
    model, tokenizer = load_reward_model(name)
    model.to(device).eval()
    found: list[float] = []
    for start in range(0, len(texts), own.batch_size):
        inputs = tokenizer(
            texts[start : start + own.batch_size], return_tensors="pt", padding=True, truncation=True
        )
        inputs.pop("token_type_ids", None)
        found += model(**inputs.to(device)).logits[:, 0].float().tolist()
    return found


def evaluate(own: EvaluationArguments) -> dict[str, list[float]]:
    """Every reward of every completion, by its name."""
    rows = load_rows(own.dataset_name, own.dataset_config or None, own.dataset_split, ())
    rows = rows.select(range(min(own.limit, len(rows))))
    is_mathematics = {"question", "answer"} <= set(rows.column_names)
    if not is_mathematics and own.prompt_column not in rows.column_names:
        raise InputError(
            f"dataset_name={own.dataset_name!r} has the columns {rows.column_names}: it needs question and "
            f"answer, or {own.prompt_column!r}. Name the column of prompts with --prompt_column"
        )
    set_seed(own.seed)
    device = (
        torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(own.model, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(own.model).to(device).eval()
    except (OSError, ValueError) as error:
        raise InputError(
            f"model={own.model!r} must be a checkpoint. Transformers says: {str(error).strip()}"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    if is_mathematics:
        chat = [
            [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": q}]
            for q in rows["question"]
        ]
        plain = [f"{SYSTEM_PROMPT}\n\n{question}\n" for question in rows["question"]]
        prompts = [as_text(tokenizer, prompt) for prompt in (chat if tokenizer.chat_template else plain)]
    else:
        prompts = [as_text(tokenizer, prompt) for prompt in rows[own.prompt_column]]
    completions = complete(model, tokenizer, prompts, own)

    found: dict[str, list[float]] = {"length": [float(len(text)) for text in completions]}
    if is_mathematics:
        found["format"] = format_reward(completions)
        found["correct"] = correctness(completions, answer=list(rows["answer"]))
        if own.judge is not None:
            judge = load_judge(JudgeArguments(judge=own.judge, judge_batch_size=own.batch_size), device)
            found["judge"] = judge(completions, question=list(rows["question"]))
    for name in own.reward_models:
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        found[Path(name).name] = scores(name, texts, own, device)
    return found


def main(argv: list[str]) -> None:
    """Evaluate, print the means, and write them.

    Raises:
        SystemExit: a value on the command line does not work; the message is one line.
    """
    (own,) = HfArgumentParser(EvaluationArguments).parse_args_into_dataclasses(argv)
    try:
        found = evaluate(own)
    except InputError as error:
        sys.exit(f"evaluate.py: {' '.join(str(error).split())}")
    means = {
        name: {
            "mean": fmean(values),
            "standard_error": stdev(values) / len(values) ** 0.5 if len(values) > 1 else None,
            "count": len(values),
        }
        for name, values in found.items()
    }
    output = Path(own.output or Path(own.model) / "evaluation.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"arguments": vars(own), "means": means}, indent=1), encoding="utf-8")
    for name, figures in means.items():
        print(f"{name:24} {figures['mean']:.4f}")
    print(output)


if __name__ == "__main__":
    main(sys.argv[1:])
