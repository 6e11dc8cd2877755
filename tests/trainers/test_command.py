"""The command ``gradreg``: TRL's scripts with the penalty, from flags and from a YAML file."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from trainers import PLAIN, REAL, assert_same, dataset, llama, tokenizer, weights
from transformers import AutoModelForCausalLM, Trainer
from trl import SFTConfig, SFTTrainer

import gradreg_optim
from gradreg_optim import attach
from gradreg_optim.__main__ import main
from gradreg_optim.trainers import command

ROOT = Path(gradreg_optim.__file__).parents[1]
FLAGS = {"grad_reg_strength": 0.05, "grad_reg_eps": "1e-2", "grad_reg_g1_clip": 0, "grad_reg_g2_clip": None}
"""``REAL`` as a file spells it: YAML reads 1e-2 as text, and both 0 and null switch a clip off."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, its tokenizer and a dataset on disk."""
    folder = tmp_path_factory.mktemp("command")
    llama().save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    (folder / "data").mkdir()
    rows = [json.dumps(row) for row in dataset("sft")]
    (folder / "data" / "train.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture
def configured(folder, tmp_path, monkeypatch):
    """Writes a configuration file for SFT; returns its name and where the model will be."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def write(**more):
        settings = {**PLAIN, "output_dir": str(tmp_path / "out"), "model_name_or_path": str(folder / "model")}
        file = tmp_path / "sft.yaml"
        file.write_text(yaml.safe_dump({**settings, "dataset_name": str(folder / "data"), **more}))
        return str(file), tmp_path / "out"

    return write


def trained(path):
    return weights(AutoModelForCausalLM.from_pretrained(path))


@pytest.fixture(scope="module")
def expected(folder, tmp_path_factory):
    """The weights of the same training in Python, with ``attach`` and without."""

    def train(settings):
        out = str(tmp_path_factory.mktemp("expected"))
        arguments = SFTConfig(**PLAIN, output_dir=out, model_init_kwargs={"dtype": "float32"})
        trainer = SFTTrainer(str(folder / "model"), arguments, train_dataset=dataset("sft"))
        if settings:
            attach(trainer, **settings)
        trainer.train()
        return weights(trainer.model)

    return train(REAL), train(None)


def test_a_file_with_the_settings(configured, expected):
    """``grad_reg_*`` keys beside TRL's own: the weights of ``attach`` bit for bit, not those of plain training."""
    file, out = configured(**FLAGS, save_strategy="steps", save_steps=3)
    before = Trainer.train
    main_of("sft", "--config", file)
    found = trained(out)
    assert_same(found, expected[0])
    assert any(not value.equal(expected[1][name]) for name, value in found.items())
    assert Trainer.train is before
    log = json.loads(next(out.glob("checkpoint-*/trainer_state.json")).read_text())["log_history"]
    assert sum("grad_reg/penalty_ratio" in entry for entry in log) == 3


def main_of(*arguments):
    """``gradreg`` with these arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["gradreg", *arguments])
        main()


def test_flags_override_the_file(configured, expected):
    """A flag counts more than its key: at strength 0 the script trains plainly."""
    file, out = configured(**FLAGS)
    main_of("sft", "--config", file, "--grad_reg_strength", "0")
    assert_same(trained(out), expected[1])


def test_under_accelerate_launch(configured, expected):
    """``accelerate launch -m gradreg_optim sft``: the same weights."""
    file, out = configured(**FLAGS)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "gradreg_optim", "sft", "--config", file]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(launch, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert run.returncode == 0, run.stderr[-5000:]
    assert_same(trained(out), expected[0])


@pytest.mark.parametrize("script", ["sft", "dpo", "grpo", "rloo", "kto", "reward"])
def test_help_shows_the_settings(script, capsys):
    """Each script's help has its own arguments and all of the penalty."""
    with pytest.raises(SystemExit, match="0"):
        main_of(script, "--help")
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: gradreg {script} ")
    assert all(f"--{flag} " in shown for flag in vars(gradreg_optim.GradRegConfig()))
    assert "--learning_rate " in shown


REFUSED = {
    "no script": ((), "required: script"),
    "unknown script": (("sfft",), r"invalid choice: 'sfft' .*sft"),
    "no training": (("env",), "invalid choice: 'env'"),
    "misspelt flag": (("sft", "--grad_reg_strenght", "1"), r"--grad_reg_strenght.*Did you mean --grad_reg_strength\?"),
    "of accelerate": (("sft", "--num_processes", "2"), "unknown arguments: --num_processes.*accelerate launch"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_unknown_arguments_end_it(arguments, message, configured, capsys):
    """Nothing trains with an argument that nobody read."""
    file, out = configured()
    more = ["--config", file] if arguments[:1] == ("sft",) else []
    with pytest.raises(SystemExit, match="2"):
        command.main([*arguments, *more])
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
    assert not out.exists()


def test_unknown_keys_end_it(configured, capsys):
    """TRL's scripts pass over keys of the file that they do not know; a misspelt one would switch a setting off."""
    file, out = configured(grad_reg_stength=0.5)
    with pytest.raises(SystemExit, match="2"):
        command.main(["sft", "--config", file])
    assert re.search(r"--grad_reg_stength.*Did you mean --grad_reg_strength\?", " ".join(capsys.readouterr().err.split()))
    assert not out.exists()


def test_the_installed_command():
    """pyproject.toml makes ``gradreg`` the function that ``python -m gradreg_optim`` calls."""
    assert f'[project.scripts]\ngradreg = "{main.__module__}:{main.__name__}"\n' in (ROOT / "pyproject.toml").read_text()
