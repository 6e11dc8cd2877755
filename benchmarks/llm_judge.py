"""GRPO on grade-school mathematics with a language model as the judge, with gradient regularization: the published recipe.

The policy is rewarded for format and for the judge's grade. Whether the answer is right is logged beside them and never
trained on: where the judge is hacked, the two part. Under ZeRO-2 on several GPUs::

    accelerate launch --config_file benchmarks/accelerate/zero2.yaml benchmarks/llm_judge.py \\
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --judge Qwen/Qwen2.5-1.5B-Instruct \\
        --bf16 True --grad_reg_radius 0.005

``--use_vllm True`` generates with vLLM. Models and datasets may be local folders. ``--grad_reg_strength 0`` is the run
without regularization. Every flag of TRL and every ``--grad_reg_*`` flag works.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo import load_model, regularized_adamw, train
from judge import SYSTEM_PROMPT, Judge, correctness, format_reward
from tables import found, load_rows
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, ModelConfig

from gradreg_optim import GradRegConfig

PUBLISHED = {
    "model_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct",
    "output_dir": "runs/llm_judge",
    "grad_reg_strength": 1e-3,
    "grad_reg_eps": 1e-3,
    "learning_rate": 5e-6,
    "num_generations": 8,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 4,
    "max_completion_length": 768,
    "max_steps": 1000,
    "beta": 0.0,
    "logging_steps": 1,
    "report_to": "none",
}


@dataclass
class JudgeArguments:
    """Who judges, and which problems."""

    judge: str = field(
        default="Qwen/Qwen2.5-1.5B-Instruct", metadata={"help": "A causal language model: a folder, or one of the Hub."}
    )
    unparsable_reward: float = field(default=-1.0, metadata={"help": "The reward where the judge's reply has no grade."})
    judge_batch_size: int = field(default=16, metadata={"help": "Solutions that the judge grades at a time."})
    dataset_name: str = field(
        default="openai/gsm8k",
        metadata={"help": "Columns question and answer: a dataset of the Hub, a folder of save_to_disk, or a file."},
    )
    dataset_config: str | None = field(default="main", metadata={"help": "Its configuration, if it has several."})
    dataset_split: str = field(default="train", metadata={"help": "The split to train on."})


def problems(rows: Any, tokenizer: Any) -> Any:
    """Prompts for the policy beside question and answer; a chat if the tokenizer has a template for one."""

    def prompt(row: dict[str, Any]) -> dict[str, Any]:
        if tokenizer.chat_template:
            chat = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": row["question"]}]
            return {"prompt": chat}
        return {"prompt": f"{SYSTEM_PROMPT}\n\n{row['question']}\n"}

    return rows.map(prompt)


def load_judge(what: JudgeArguments, device: Any) -> Judge:
    """The judge, on ``device``.

    Raises:
        InputError: there is no such model.
    """
    with found("judge", what.judge):
        model = AutoModelForCausalLM.from_pretrained(what.judge)
        tokenizer = AutoTokenizer.from_pretrained(what.judge)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Judge(model.to(device), tokenizer, unparsable=what.unparsable_reward, batch_size=what.judge_batch_size)


def build_trainer(what: JudgeArguments, args: GRPOConfig, model_args: ModelConfig, grad_reg: GradRegConfig) -> GRPOTrainer:
    """Problems, rewards, policy, and the wrapped optimizer."""
    rows = load_rows(what.dataset_name, what.dataset_config, what.dataset_split, ("question", "answer"))
    judge = load_judge(what, args.device)
    model, tokenizer = load_model(args, model_args)
    args.reward_weights = [1.0, 1.0, 0.0]  # the truth is logged, and nothing is learned from it
    return GRPOTrainer(
        model=model,
        reward_funcs=[format_reward, judge, correctness],
        args=args,
        train_dataset=problems(rows, tokenizer),
        processing_class=tokenizer,
        optimizers=(regularized_adamw(model, args, grad_reg), None),
    )


def main(argv: list[str]) -> None:
    """Train, report, and save the policy.

    Raises:
        SystemExit: something given on the command line does not work; the message is one line.
    """

    def title(what: JudgeArguments, model: str | None, strength: float) -> str:
        return f"{Path(str(model)).name} judged by {Path(what.judge).name}: GRPO, strength {strength:g}"

    train("llm_judge.py", argv, JudgeArguments, PUBLISHED, build_trainer, title, saves=True)


if __name__ == "__main__":
    main(sys.argv[1:])
