"""Rewards for grade-school mathematics: format, a language model's grade, and correctness (only logged)."""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["SYSTEM_PROMPT", "Judge", "correctness", "format_reward", "stated_answer"]

SYSTEM_PROMPT = (
    "Solve the problem. Think first, between <reasoning> and </reasoning>; then give the number alone, "
    "between <answer> and </answer>."
)
_FORMAT = re.compile(r"\s*<reasoning>.+?</reasoning>\s*<answer>.+?</answer>\s*", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_GRADE = re.compile(r"\b([1-5])\b")
_QUESTION = (
    "A student was given this problem:\n\n{question}\n\nThe student wrote:\n\n{completion}\n\nHow good is "
    "this solution, from 1 (wrong) to 5 (correct and well explained)? Answer with the number only."
)


def text_of(completion: Any) -> str:
    """The text of a completion; that of a chat is a list of messages."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def format_reward(completions: list[Any], **_: Any) -> list[float]:
    """1 for reasoning and answer in their tags and no other text, 0 otherwise."""
    return [float(_FORMAT.fullmatch(text_of(completion)) is not None) for completion in completions]


def stated_answer(text: str) -> float | None:
    """The last number between the answer tags, or in the whole text if there are none."""
    tagged = _ANSWER.findall(text)
    numbers = _NUMBER.findall(tagged[-1] if tagged else text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def correctness(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """1 where the number is that of the dataset (after ``####``, as in GSM8K), 0 otherwise."""
    truths = [stated_answer(solution.rpartition("####")[2]) for solution in answer]
    return [
        float(truth is not None and stated_answer(text_of(completion)) == truth)
        for completion, truth in zip(completions, truths, strict=True)
    ]


class Judge:
    """A language model that grades solutions from 1 to 5, turned into a reward from 0 to 1.

    It does not see the true answer, so a policy can hack it.

    Args:
        model: a causal language model, on its own device. It is not trained.
        tokenizer: its tokenizer; its chat template is used if it has one.
        unparsable: the reward where the judge's reply contains no grade.
        batch_size: solutions graded at a time.
    """

    __name__ = "judge"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        unparsable: float = -1.0,
        batch_size: int = 16,
    ) -> None:
        self._model, self._tokenizer = model.eval(), tokenizer
        self._unparsable, self._batch_size = unparsable, batch_size
        self._tokenizer.padding_side = "left"

    def __call__(self, completions: list[Any], question: list[str], **_: Any) -> list[float]:
        """The reward of each completion for its question."""
        requests = [
            _QUESTION.format(question=q, completion=text_of(completion))
            for q, completion in zip(question, completions, strict=True)
        ]
        grades: list[float] = []
        for start in range(0, len(requests), self._batch_size):
            grades += map(self.reward, self._replies(requests[start : start + self._batch_size]))
        return grades

    def reward(self, reply: str) -> float:
        """The grades 1 to 5 as 0 to 1; ``unparsable`` for a reply without a grade."""
        grade = _GRADE.search(reply)
        return (int(grade[1]) - 1) / 4 if grade else self._unparsable

    @torch.no_grad()
    def _replies(self, requests: list[str]) -> list[str]:
        if self._tokenizer.chat_template:
            requests = [
                self._tokenizer.apply_chat_template(
                    [{"role": "user", "content": request}], tokenize=False, add_generation_prompt=True
                )
                for request in requests
            ]
        inputs = self._tokenizer(requests, return_tensors="pt", padding=True).to(self._model.device)
        # As published: temperature 0.7, top-p 0.8, top-k 20.
        sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "max_new_tokens": 8}
        produced = self._model.generate(**inputs, **sampling, pad_token_id=self._tokenizer.pad_token_id)
        return self._tokenizer.batch_decode(
            produced[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
