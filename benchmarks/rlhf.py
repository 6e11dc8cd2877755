"""GRPO against a learned reward model on instruction data, with gradient regularization: the published RLHF recipe.

The published run, a 0.5B model on one machine with several GPUs, under ZeRO-2::

    accelerate launch --config_file benchmarks/accelerate/zero2.yaml benchmarks/rlhf.py \\
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --bf16 True --grad_reg_radius 0.005 \\
        --reward_model Skywork/Skywork-Reward-V2-Qwen3-0.6B --dataset_name trl-lib/ultrafeedback-prompt

(``--grad_reg_radius`` is ours: in bf16 the published step of eps = 1e-3 is mostly rounding.) ``--use_vllm True`` generates
with vLLM. Models and datasets may be local folders. ``--grad_reg_strength 0`` is the run without regularization. Every
flag of TRL and every ``--grad_reg_*`` flag works; ``evaluate.py`` measures the checkpoint afterwards.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo import load_model, regularized_adamw, train
from tables import found, load_rows
from tasks import InputError
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, ModelConfig

from gradreg_optim import GradRegConfig

PUBLISHED = {
    "model_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct",
    "output_dir": "runs/rlhf",
    "grad_reg_strength": 1e-2,
    "grad_reg_eps": 1e-3,
    "learning_rate": 5e-6,
    "num_generations": 8,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 4,
    "max_steps": 250,
    "beta": 0.0,
    "logging_steps": 1,
    "report_to": "none",
}


@dataclass
class RLHFArguments:
    """What is rewarded, and on which prompts."""

    reward_model: str = field(
        default="Skywork/Skywork-Reward-V2-Qwen3-0.6B",
        metadata={"help": "A sequence classifier with one output: a folder, or a model of the Hub."},
    )
    dataset_name: str = field(
        default="trl-lib/ultrafeedback-prompt",
        metadata={"help": "A dataset of the Hub, a folder of save_to_disk, or a JSON, CSV or Parquet file."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration, if it has several."})
    dataset_split: str = field(default="train", metadata={"help": "The split to train on."})
    prompt_column: str = field(default="prompt", metadata={"help": "The column of prompts: texts, or lists of messages."})


def load_reward_model(name: str) -> tuple[Any, Any]:
    """The classifier that scores and its tokenizer.

    Raises:
        InputError: there is no such model, or it has several outputs.
    """
    with found("reward_model", name):
        model = AutoModelForSequenceClassification.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
    if model.config.num_labels != 1:
        raise InputError(
            f"reward_model={name!r} has {model.config.num_labels} outputs, a reward is one number: give a model with one"
        )
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def build_trainer(what: RLHFArguments, args: GRPOConfig, model_args: ModelConfig, grad_reg: GradRegConfig) -> GRPOTrainer:
    """Prompts, reward model, policy, and the wrapped optimizer."""
    rows = load_rows(what.dataset_name, what.dataset_config, what.dataset_split, (what.prompt_column,))
    prompts = rows.select_columns(what.prompt_column).rename_columns({what.prompt_column: "prompt"})
    scorer, scorer_tokenizer = load_reward_model(what.reward_model)
    model, tokenizer = load_model(args, model_args)
    return GRPOTrainer(
        model=model,
        reward_funcs=scorer,
        reward_processing_classes=scorer_tokenizer,
        args=args,
        train_dataset=prompts,
        processing_class=tokenizer,
        optimizers=(regularized_adamw(model, args, grad_reg), None),
    )


def main(argv: list[str]) -> None:
    """Train, report, and save the policy.

    Raises:
        SystemExit: something given on the command line does not work; the message is one line.
    """

    def title(what: RLHFArguments, model: str | None, strength: float) -> str:
        return f"{Path(str(model)).name} against {Path(what.reward_model).name}: GRPO, strength {strength:g}"

    train("rlhf.py", argv, RLHFArguments, PUBLISHED, build_trainer, title, saves=True)


if __name__ == "__main__":
    main(sys.argv[1:])
