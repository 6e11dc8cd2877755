r"""GRPO on grade-school mathematics with a language model as the judge: the published LLM-judge experiment.

The policy is rewarded for format and for the judge's grade. The script logs whether the answer is right
beside them, but does not train on it: the grade and the truth come apart when the policy hacks the judge.
Under ZeRO-2 on several GPUs::

    accelerate launch --config_file examples/grpo/zero2.yaml -m examples.published.llm_judge \
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --judge Qwen/Qwen2.5-1.5B-Instruct \
        --bf16 True --grad_reg_radius auto

The settings of the penalty are :data:`gradreg_optim.PUBLISHED` with γ = 1e-3. ``--grad_reg_published False
--grad_reg_strength auto`` takes this package's defaults instead, and ``--grad_reg_strength 0`` is the run
without regularization. ``--use_vllm True`` generates with vLLM. Models and datasets may be local folders.
Every flag of TRL and every ``--grad_reg_*`` flag works.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, ModelConfig

from examples.grpo.models import load_model
from examples.grpo.training import regularized_adamw, train
from examples.published.judge import SYSTEM_PROMPT, Judge, correctness, format_reward
from examples.published.loading import load_rows, naming
from gradreg_optim import GradRegConfig

PUBLISHED = {
    "model_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct",
    "output_dir": "runs/llm_judge",
    "grad_reg_published": True,  # gradreg_optim.PUBLISHED
    "grad_reg_strength": 1e-3,
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
    """The judge and the problems."""

    judge: str = field(
        default="Qwen/Qwen2.5-1.5B-Instruct",
        metadata={"help": "A causal language model: a folder, or one of the Hub."},
    )
    unparsable_reward: float = field(
        default=-1.0, metadata={"help": "The reward where the judge's reply has no grade."}
    )
    judge_batch_size: int = field(default=16, metadata={"help": "Solutions that the judge grades at a time."})
    dataset_name: str = field(
        default="openai/gsm8k",
        metadata={
            "help": "Columns question and answer: a dataset of the Hub, a folder of save_to_disk, or a file."
        },
    )
    dataset_config: str | None = field(
        default="main", metadata={"help": "Its configuration, if it has several."}
    )
    dataset_split: str = field(default="train", metadata={"help": "The split to train on."})


def problems(rows: Any, tokenizer: Any) -> Any:
    """Prompts beside question and answer; they are chats if the tokenizer has a chat template."""

    def prompt(row: dict[str, Any]) -> dict[str, Any]:
        if tokenizer.chat_template:
            chat = [
                {"role": "system", "content": SYSTEM_PROMPT},
                {"role": "user", "content": row["question"]},
            ]
            return {"prompt": chat}
        return {"prompt": f"{SYSTEM_PROMPT}\n\n{row['question']}\n"}

    return rows.map(prompt)


def load_judge(own: JudgeArguments, device: Any) -> Judge:
    """The judge, on ``device``.

    Raises:
        InputError: there is no such model.
    """
    with naming("judge", own.judge):
        model = AutoModelForCausalLM.from_pretrained(own.judge)
        tokenizer = AutoTokenizer.from_pretrained(own.judge)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Judge(
        model.to(device), tokenizer, unparsable=own.unparsable_reward, batch_size=own.judge_batch_size
    )


def build_trainer(
    own: JudgeArguments, args: GRPOConfig, model_args: ModelConfig, grad_reg: GradRegConfig
) -> GRPOTrainer:
    """Put problems, rewards, policy and regularized optimizer together."""
    rows = load_rows(own.dataset_name, own.dataset_config, own.dataset_split, ("question", "answer"))
    judge = load_judge(own, args.device)
    model, tokenizer = load_model(args, model_args)
    args.reward_weights = [1.0, 1.0, 0.0]  # correctness is logged, and not trained on
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
        SystemExit: a value on the command line does not work; the message is one line.
    """

    def title(own: JudgeArguments, model: str | None, strength: float | str) -> str:
        return f"{Path(str(model)).name} judged by {Path(own.judge).name}: GRPO, strength {strength}"

    train("llm_judge.py", argv, JudgeArguments, PUBLISHED, build_trainer, title, saves=True)


if __name__ == "__main__":
    main(sys.argv[1:])
