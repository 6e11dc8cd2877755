"""A chat model of 60,000 parameters with its tokenizer and a dataset, for the examples of training stacks.

python -m examples.tiny runs/tiny
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write(folder: Path) -> Path:
    """Write ``model/`` and ``data/train.jsonl`` and ``.parquet`` (16 dialogues) into ``folder``."""
    # One token a byte, as in Qwen's tokenizer without its merges.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(BPE({token: i for i, token in enumerate(letters + SPECIAL)}, []))
    words.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    inputs = ["input_ids", "attention_mask"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        model_input_names=inputs,
        chat_template=TEMPLATE,
    )
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=264,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,  # far enough from uniform predictions for the curvature to be felt
        pad_token_id=256,
        bos_token_id=None,
        eos_token_id=258,
        tie_word_embeddings=False,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "data").mkdir(parents=True, exist_ok=True)
    rows = [{"messages": _dialogue(random.Random(seed), 3 + seed % 5)} for seed in range(16)]
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "data" / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "data" / "train.parquet")
    return folder


def _dialogue(chance: random.Random, length: int) -> list[dict[str, str]]:
    names = chance.choices(["ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen"], k=length)
    return [
        {"role": "user", "content": " ".join(names)},
        {"role": "assistant", "content": " ".join(reversed(names))},
    ]


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
