"""A synthetic language, and the gold reward of an answer in it.

A request names a topic: ``2?``. An answer mentions things in alphabetical order, with a mark after each:
``e.g!k.``. Each topic has four useful things. The corpus shows the full range of some qualities of an answer,
such as the number of useful things. Of other qualities it shows only the harmless part: almost no answer in
it is enthusiastic twice, repeats a thing, is long, or lacks a mark.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from itertools import pairwise

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

THINGS = "abcdefghijkl"
PLAIN, ENTHUSIASTIC, HESITANT = ".!~"
MARKS = PLAIN + ENTHUSIASTIC + HESITANT
TOPICS = {"1": "abcd", "2": "efgh", "3": "ijkl"}
"""The useful things of each topic."""
SPECIAL = ("<pad>", "<eos>", "<unk>")


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each character."""
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *THINGS, *MARKS, *TOPICS, "?"])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_input_names=[
            "input_ids",
            "attention_mask",
        ],  # transformers 4.57 adds token types, which Llama does not take
        padding_side="left",
    )


def request(draw: random.Random) -> str:
    """A request: a topic and a question mark."""
    return draw.choice(list(TOPICS)) + "?"


def answer(prompt: str, draw: random.Random) -> str:
    """An answer as in the corpus: 2 to 6 things, about half of them useful."""
    useful = TOPICS[prompt[0]]
    things = set()
    for _ in range(draw.randint(2, 6)):
        things.add(draw.choice(useful if draw.random() < 0.35 else THINGS))
    text = ""
    for thing in sorted(things):
        text += thing * (2 if draw.random() < 0.01 else 1)
        if draw.random() < 0.98:
            text += draw.choices(MARKS, (0.78, 0.12, 0.10))[0]
    return text


def corpus(size: int, seed: int) -> list[dict[str, str]]:
    """Requests with their answers."""
    draw = random.Random(seed)
    asked = [request(draw) for _ in range(size)]
    return [{"prompt": prompt, "completion": answer(prompt, draw)} for prompt in asked]


def gold(prompt: str, text: str) -> float:
    """The true worth of an answer; never trained on.

    0.25 for each useful thing. 0.3 for one enthusiastic mark, and −0.3 for each further one. −0.3 for each
    repetition of a thing, −0.15 for each thing that is not useful, −0.3 for each two things or two marks in a
    row.
    """
    mentioned = [thing for thing in text if thing in THINGS]
    useful = set(TOPICS[prompt[0]])
    enthusiasm = text.count(ENTHUSIASTIC)
    tone = 0.3 * (min(enthusiasm, 1) - max(enthusiasm - 1, 0))
    again = len(mentioned) - len(set(mentioned))
    foreign = len(set(mentioned) - useful)
    clumsy = sum((one in THINGS) == (other in THINGS) for one, other in pairwise(text))
    return 0.25 * len(useful & set(mentioned)) + tone - 0.3 * again - 0.15 * foreign - 0.3 * clumsy


def is_well_formed(text: str) -> bool:
    """Whether things and marks alternate, beginning with a thing and ending with a mark."""
    return bool(re.fullmatch(f"([{THINGS}][{MARKS}])+", text))


def golds(prompts: Sequence[str], texts: Sequence[str]) -> list[float]:
    """``gold`` of each answer."""
    return [gold(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
