"""The Python blocks of README.md and docs/, and toys in the place of the models and data that they name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NOT_RUN = "<!-- not run: "
"""What stands before a block that does not run in a test, with the reason."""


def blocks(page: str) -> Iterator[tuple[str, bool]]:
    """Each block of a page, and whether it can run."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for before, code in re.findall(r"^(.*)\n```python\n((?:.*\n)*?)```", text, re.MULTILINE):
        yield code, not before.startswith(NOT_RUN)


def toys(folder: Path) -> dict[str, Any]:
    """What the blocks about trainers take as given."""
    from trainers import Reward, dataset, llama, tokenizer
    from trl import GRPOConfig, GRPOTrainer

    given = {"tokenizer": tokenizer(), "dataset": dataset("grpo"), "reward": Reward(), "model": llama()}
    given["args"] = GRPOConfig(output_dir=str(folder))
    trainer = GRPOTrainer(
        model=llama(),
        args=given["args"],
        reward_funcs=given["reward"],
        train_dataset=given["dataset"],
        processing_class=given["tokenizer"],
    )
    return {**given, "trainer": trainer}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Gives ``GRPOConfig`` other defaults: one small step on a CPU. Runs the test in a folder of its own."""
    trl = pytest.importorskip("trl", reason="trainers come with the extra [trl]")
    small = {
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "num_generations": 2,
        "max_completion_length": 4,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    fields = [(name, type(value), field(default=value)) for name, value in small.items()]
    monkeypatch.setattr(trl, "GRPOConfig", make_dataclass("GRPOConfig", fields, bases=(trl.GRPOConfig,)))
    monkeypatch.chdir(tmp_path)
