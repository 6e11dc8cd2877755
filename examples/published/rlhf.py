r"""GRPO against a learned reward model on instruction data: the published RLHF experiment.

The published run trains a 0.5B model under ZeRO-2 on one machine with several GPUs::

    accelerate launch --config_file examples/grpo/zero2.yaml -m examples.published.rlhf \
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --bf16 True --grad_reg_radius auto \
        --reward_model Skywork/Skywork-Reward-V2-Qwen3-0.6B --dataset_name trl-lib/ultrafeedback-prompt

The settings of the penalty are :data:`gradreg_optim.PUBLISHED`; ``--grad_reg_published False`` takes this
package's defaults instead. ``--grad_reg_radius`` is our addition: in bf16 the published step of eps = 1e-3 is
mostly rounding, and ``auto`` finds a better one. ``--grad_reg_strength 0`` is the run without regularization.
``--use_vllm True`` generates with vLLM. Models and datasets may be local folders. Every flag of TRL and every
``--grad_reg_*`` flag works. Measure the checkpoint with :mod:`examples.published.evaluate`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, ModelConfig

from examples.grpo.flags import InputError
from examples.grpo.models import load_model
from examples.grpo.training import regularized_adamw, train
from examples.published.loading import load_rows, naming
from gradreg_optim import GradRegConfig

PUBLISHED = {
    "model_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct",
    "output_dir": "runs/rlhf",
    "grad_reg_published": True,  # gradreg_optim.PUBLISHED
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
    """The reward model and the prompts."""

    reward_model: str = field(
        default="Skywork/Skywork-Reward-V2-Qwen3-0.6B",
        metadata={"help": "A sequence classifier with one output: a folder, or a model of the Hub."},
    )
    dataset_name: str = field(
        default="trl-lib/ultrafeedback-prompt",
        metadata={"help": "A dataset of the Hub, a folder of save_to_disk, or a JSON, CSV or Parquet file."},
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Its configuration, if it has several."}
    )
    dataset_split: str = field(default="train", metadata={"help": "The split to train on."})
    prompt_column: str = field(
        default="prompt", metadata={"help": "The column of prompts: texts, or lists of messages."}
    )


def load_reward_model(name: str) -> tuple[Any, Any]:
    """The reward model and its tokenizer.

    Raises:
        InputError: there is no such model, or it has several outputs.
    """
    with naming("reward_model", name):
        model = AutoModelForSequenceClassification.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
    if model.config.num_labels != 1:
        raise InputError(
            f"reward_model={name!r} has {model.config.num_labels} outputs, a reward is one number: give a "
            f"model with one"
        )
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def build_trainer(
    own: RLHFArguments, args: GRPOConfig, model_args: ModelConfig, grad_reg: GradRegConfig
) -> GRPOTrainer:
    """Put prompts, reward model, policy and regularized optimizer together."""
    rows = load_rows(own.dataset_name, own.dataset_config, own.dataset_split, (own.prompt_column,))
    prompts = rows.select_columns(own.prompt_column).rename_columns({own.prompt_column: "prompt"})
    scorer, scorer_tokenizer = load_reward_model(own.reward_model)
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
        SystemExit: a value on the command line does not work; the message is one line.
    """

    def title(own: RLHFArguments, model: str | None, strength: float | str) -> str:
        return f"{Path(str(model)).name} against {Path(own.reward_model).name}: GRPO, strength {strength}"

    train("rlhf.py", argv, RLHFArguments, PUBLISHED, build_trainer, title, saves=True)


if __name__ == "__main__":
    main(sys.argv[1:])
