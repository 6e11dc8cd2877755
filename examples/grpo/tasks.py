"""Verifiable tasks (sums of two digits, or any dataset of reasoning-gym): prompts and rewards."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, Protocol

from datasets import Dataset

from examples.grpo.flags import InputError


class Tasks(Protocol):
    """What is used of a reasoning-gym dataset."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> dict[str, Any]:
        """A task: its ``question`` and ``answer``."""

    def score_answer(self, answer: str | None, entry: dict[str, Any]) -> float:
        """The score of ``answer`` to the task ``entry``, between 0 and 1."""


class Sums:
    """Sums of two digits.

    Args:
        seed: of the digits.
        size: the number of tasks.
    """

    def __init__(self, seed: int, size: int) -> None:
        draw = random.Random(seed)
        self.terms = [(draw.randint(0, 9), draw.randint(0, 9)) for _ in range(size)]

    def __len__(self) -> int:
        """The number of tasks."""
        return len(self.terms)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A task: its ``question`` and ``answer``."""
        first, second = self.terms[index]
        return {"question": f"State the answer: {first} + {second} =", "answer": str(first + second)}

    def score_answer(self, answer: str | None, entry: dict[str, Any]) -> float:
        """1 for the right number alone, its share of a longer text, and 0 for a text without it."""
        numbers = re.findall(r"\d+", answer or "")
        return len(entry["answer"]) / len(str(answer)) if entry["answer"] in numbers else 0.0


@dataclass
class TaskArguments:
    """What to train on."""

    task: str = field(
        default="sums", metadata={"help": "sums (of two digits), or the name of a reasoning-gym dataset."}
    )
    task_config: str | None = field(
        default=None,
        metadata={"help": "Settings of the reasoning-gym dataset, a JSON object. Default: its own."},
    )
    task_size: int = field(default=512, metadata={"help": "Number of tasks to draw."})
    task_seed: int = field(
        default=0, metadata={"help": "Seed of the tasks, apart from that of the training."}
    )
    system_prompt: str | None = field(
        default=None,
        metadata={
            "help": (
                "Ask in a chat that opens with this message. Default: plain text for the model to continue."
            )
        },
    )
    compare: bool = field(
        default=True,
        metadata={
            "help": (
                "On one process: train without the penalty first, from the same seed, and report both runs."
            )
        },
    )


def load_tasks(arguments: TaskArguments) -> Tasks:
    """Draw the tasks.

    Raises:
        InputError: there is no such dataset, its package is missing, or it refuses the size or the settings.
    """
    if arguments.task_size < 1:
        raise InputError(f"task_size={arguments.task_size} leaves no task to train on: give 1 or more")
    if arguments.task == "sums":
        if arguments.task_config is not None:
            raise InputError(
                f"task_config={arguments.task_config!r} needs --task: it is for datasets of reasoning-gym"
            )
        return Sums(arguments.task_seed, arguments.task_size)
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ModuleNotFoundError as missing:
        raise InputError(
            f"task={arguments.task!r} must be sums, or a dataset of reasoning-gym, which is not "
            f"installed ({missing.name} is missing). Run pip install reasoning-gym (it compiles one "
            "dependency), or leave the flag out"
        ) from missing
    if arguments.task not in DATASETS:
        similar = ", ".join(get_close_matches(arguments.task, DATASETS)) or "chain_sum, spell_backward, gcd"
        raise InputError(
            f"task={arguments.task!r} must be sums, or one of the {len(DATASETS)} datasets of "
            f"reasoning-gym. Try: {similar}"
        )
    settings = _settings(
        arguments, {setting.name for setting in fields(DATASETS[arguments.task][1])} - {"seed", "size"}
    )
    try:
        drawn: Tasks = create_dataset(
            arguments.task, seed=arguments.task_seed, size=arguments.task_size, **settings
        )
    except (AssertionError, TypeError, ValueError) as error:
        raise InputError(
            f"task_config={arguments.task_config!r} must suit {arguments.task}, which says: "
            f"{error}. Change that setting"
        ) from error
    return drawn


def _settings(arguments: TaskArguments, names: set[str]) -> dict[str, Any]:
    """``task_config`` as keyword arguments of the dataset's configuration."""
    if arguments.task_config is None:
        return {}
    known = sorted(names)
    rule = f"task_config={arguments.task_config!r} must be a JSON object with settings of {arguments.task}"
    try:
        settings = json.loads(arguments.task_config)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{rule}, but does not parse ({error}). Give, for example, '{{\"{known[0]}\": 1}}'"
        ) from error
    if not isinstance(settings, dict) or not settings.keys() <= names:
        raise InputError(
            f"{rule}. It has: {', '.join(known)} (size and seed are --task_size and --task_seed)"
        )
    return settings


def prompts(tasks: Tasks, system_prompt: str | None) -> Dataset:
    """One row for each task: its prompt, and its index, by which the reward finds the task."""

    def prompt(question: str) -> str | list[dict[str, str]]:
        if system_prompt is None:
            return question
        return [{"role": "system", "content": system_prompt}, {"role": "user", "content": question}]

    return Dataset.from_list(
        [{"prompt": prompt(tasks[index]["question"]), "index": index} for index in range(len(tasks))]
    )


def reward(tasks: Tasks) -> Callable[..., list[float | None]]:
    """The reward function: the tasks' own score of a stripped completion, between 0 and 1."""

    def score(completions: list[Any], index: list[int], **_: Any) -> list[float | None]:
        texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
        return [
            float(tasks.score_answer(text.strip(), tasks[i])) for text, i in zip(texts, index, strict=True)
        ]

    return score
