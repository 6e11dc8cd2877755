"""Verifiable tasks from reasoning-gym: the tasks, their prompts, and the reward of an answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any

import reasoning_gym
from datasets import Dataset
from reasoning_gym.dataset import ProceduralDataset
from reasoning_gym.factory import DATASETS

from examples.grpo.flags import InputError

EASIER = {"chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}}
"""Settings that replace a dataset's own where those are too hard for a model of 135M parameters."""


@dataclass
class TaskArguments:
    """What to train on."""

    task: str = field(default="chain_sum", metadata={"help": "Name of a reasoning-gym dataset."})
    task_config: str | None = field(
        default=None,
        metadata={"help": "Settings of that dataset, a JSON object. Default: its own; of chain_sum, two single digits."},
    )
    task_size: int = field(default=512, metadata={"help": "Number of tasks to draw."})
    task_seed: int = field(default=0, metadata={"help": "Seed of the tasks, apart from that of the training."})
    system_prompt: str | None = field(
        default=None,
        metadata={"help": "Ask in a chat that opens with this message. Default: plain text for the model to continue."},
    )


def load_tasks(arguments: TaskArguments) -> ProceduralDataset:
    """Draw the tasks.

    Raises:
        InputError: there is no such dataset, or it refuses the size or the settings.
    """
    if arguments.task not in DATASETS:
        similar = ", ".join(get_close_matches(arguments.task, DATASETS)) or "chain_sum, spell_backward, gcd"
        raise InputError(
            f"task={arguments.task!r} must be one of the {len(DATASETS)} datasets of reasoning-gym. Try: {similar}"
        )
    if arguments.task_size < 1:
        raise InputError(f"task_size={arguments.task_size} leaves no task to train on: give 1 or more")
    settings = _settings(arguments)
    try:
        return reasoning_gym.create_dataset(arguments.task, seed=arguments.task_seed, size=arguments.task_size, **settings)
    except (AssertionError, TypeError, ValueError) as error:
        raise InputError(
            f"task_config={arguments.task_config!r} must suit {arguments.task}, which says: {error}. Change that setting"
        ) from error


def _settings(arguments: TaskArguments) -> dict[str, Any]:
    """``task_config`` as keyword arguments of the dataset's configuration."""
    if arguments.task_config is None:
        return EASIER.get(arguments.task, {})
    known = sorted({setting.name for setting in fields(DATASETS[arguments.task][1])} - {"seed", "size"})
    rule = f"task_config={arguments.task_config!r} must be a JSON object with settings of {arguments.task}"
    try:
        settings = json.loads(arguments.task_config)
    except json.JSONDecodeError as error:
        raise InputError(f"{rule}, but does not parse ({error}). Give, for example, '{{\"{known[0]}\": 1}}'") from error
    if not isinstance(settings, dict) or not settings.keys() <= set(known):
        raise InputError(f"{rule}. It has: {', '.join(known)} (size and seed are --task_size and --task_seed)")
    return settings


def prompts(tasks: ProceduralDataset, system_prompt: str | None) -> Dataset:
    """One row for each task: its prompt, and its index, by which the reward finds the task."""

    def prompt(question: str) -> str | list[dict[str, str]]:
        if system_prompt is None:
            return question
        return [{"role": "system", "content": system_prompt}, {"role": "user", "content": question}]

    return Dataset.from_list([{"prompt": prompt(tasks[index]["question"]), "index": index} for index in range(len(tasks))])


def reward(tasks: ProceduralDataset) -> Callable[..., list[float | None]]:
    """The reward function: reasoning-gym's own score of a stripped completion, between 0 and 1."""

    def score(completions: list[Any], index: list[int], **_: Any) -> list[float | None]:
        texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
        return [float(tasks.score_answer(text.strip(), tasks[i])) for text, i in zip(texts, index, strict=True)]

    return score
