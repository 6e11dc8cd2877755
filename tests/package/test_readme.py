"""The README: its code runs, its tables name what there is, its length is bounded."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
from page_blocks import ROOT, blocks, tiny, toys  # noqa: F401

from gradreg_optim import GradRegOptimizer

README = (ROOT / "README.md").read_text(encoding="utf-8")
TRAINER, LOOP, ENGINE = (code for code, _ in blocks("README.md"))


def test_length():
    """It stays within 150 lines."""
    assert README.count("\n") <= 150


def test_loop_example_runs():
    """The block about a loop of one's own runs, and the assertion in it holds."""
    exec(LOOP, {})


@pytest.mark.usefixtures("tiny")
def test_trainer_example_runs(monkeypatch, tmp_path):
    """The block about TRL runs and is regularized; a tiny model, reward and dataset replace its own."""
    import datasets
    import trl

    given = toys(tmp_path)
    given["model"].save_pretrained(tmp_path / "model")
    build = trl.GRPOTrainer

    def with_toys(model: str, reward_funcs: str, **kwargs: Any) -> Any:
        assert (model, reward_funcs) != ("", "")
        given_here = {"reward_funcs": given["reward"], "processing_class": given["tokenizer"]}
        return build(model=str(tmp_path / "model"), **given_here, **kwargs)

    monkeypatch.setattr(trl, "GRPOTrainer", with_toys)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: given["dataset"])
    names: dict[str, Any] = {}
    exec(TRAINER, names)
    logged = names["trainer"].state.log_history[0]
    assert logged["grad_reg/penalty_ratio"] > 0
    assert logged["grad_reg/reweighted"] == 1


def test_engine_example_says_what_the_example_does():
    """The block about DeepSpeed has the loop of examples/deepspeed_loop.py, which runs as a test."""
    compile(ENGINE, "README.md", "exec")
    example = (ROOT / "examples/deepspeed_loop.py").read_text(encoding="utf-8")
    for line in (
        "for _ in optimizer.passes(micro_batches=",
        "engine.step()",
        "optimizer = ZeroGradRegOptimizer(engine",
    ):
        assert line in ENGINE
        assert line in example


def test_tables_name_what_there_is():
    """Six settings that the optimizer has, and five metrics that docs/metrics.md explains."""
    tables = re.findall(r"\n\n((?:\|.*\n)+)", README)
    rows = ([row.split("|")[1] for row in table.splitlines()[2:]] for table in tables)
    settings, metrics = ([re.findall(r"`(\w+)`", row) for row in of_table] for of_table in rows)
    assert len(settings) == 6
    assert {name for row in settings for name in row} <= set(inspect.signature(GradRegOptimizer).parameters)
    assert len(metrics) == 5
    documented = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in documented for row in metrics for name in row)
