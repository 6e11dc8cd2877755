"""The README: its code runs, its defaults are the signatures', its length is bounded."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

import gradreg_optim
from benchmarks.common.results import link_from_root, newest
from gradreg_optim import GradRegConfig, GradRegOptimizer

ROOT = Path(gradreg_optim.__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
ROWS = re.findall(r"^\| `(\w+)` \| (?:`--(\w+)` )?\| (\S+) \|", README, re.MULTILINE)


def test_length():
    """It stays within 200 lines."""
    assert README.count("\n") <= 200


def test_loop_examples_run():
    """The block without a trainer runs, and the assertion in it holds."""
    (block,) = [block for block in BLOCKS if "trainer" not in block]
    exec(block, {})


def test_trainers_are_those_that_were_tested():
    """The table of trainers is what the last run of the matrix wrote."""
    matrix = importlib.import_module("benchmarks.trainers.__main__")
    file = newest("trainers")
    runs = json.loads(file.read_text())["runs"]
    assert matrix.in_readme(README, matrix.summary(runs, link_from_root(file))) == README


def test_trainer_examples_run(tmp_path):
    """The trainer block and the calls of attach run on a tiny model, and each logs its grad_reg figures."""
    pytest.importorskip("trl", reason="trainers come with the extra [trl]")
    from trainers import Reward, dataset, llama, tokenizer
    from trl import GRPOConfig

    (given,) = [block for block in BLOCKS if "trainer" in block]
    calls = re.findall(r"`(attach\(trainer, .*?\))`", README)
    assert len(calls) == 2
    created = re.sub(r"\n *optimizers=.*", "", given)
    assert created != given
    blocks = [given, *(created.replace("trainer.train()", f"{call}\ntrainer.train()") for call in calls)]
    names = {name: getattr(gradreg_optim, name) for name in ("GradRegOptimizer", "GradRegConfig", "attach")}
    names |= {"tokenizer": tokenizer(), "dataset": dataset("grpo"), "reward": Reward()}
    for number, block in enumerate(blocks):
        names["model"] = llama()
        names["args"] = GRPOConfig(
            output_dir=str(tmp_path / str(number)),
            max_steps=1,
            per_device_train_batch_size=2,
            num_generations=2,
            max_completion_length=4,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        )
        exec(block, names)
        assert "grad_reg/penalty_ratio" in names["trainer"].state.log_history[0]


def test_costs_are_the_measured_ones():
    """What the README says about cost is what ``make bench`` makes of the newest results."""
    pytest.importorskip("tqdm", reason="the benchmarks come with the extra [demo]")
    bench = importlib.import_module("benchmarks.cost.__main__")
    files = bench.newest_files(bench.RESULTS)
    assert bench.between_marks(README, "cost", bench.section(files)) == README


def test_settings_table_is_complete():
    """Each argument of the constructor has its row, with the default of the signature and the flag of the config."""
    parameters = dict(inspect.signature(GradRegOptimizer).parameters)
    del parameters["optimizer"]
    assert [name for name, _, _ in ROWS] == list(parameters)
    for name, _, default in ROWS:
        assert default == str(parameters[name].default), name
    assert {flag for _, flag, _ in ROWS if flag} == {field.name for field in fields(GradRegConfig)}
