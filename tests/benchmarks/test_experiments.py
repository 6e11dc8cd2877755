"""The published experiments, ``examples/published``, with tiny models, offline: two steps of each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="trainers come with the extra [trl]")
pytest.importorskip("matplotlib", reason="matplotlib belongs to the demo extra")

import trl
from trainers import llama, sentence, tokenizer
from transformers import LlamaForSequenceClassification

from examples.published import evaluate, judge, llm_judge, rlhf

SMALL = [
    "--max_steps",
    "2",
    "--use_cpu",
    "--bf16",
    "False",
    "--num_generations",
    "2",
    "--per_device_train_batch_size",
    "2",
]
SHORT = [
    "--gradient_accumulation_steps",
    "2",
    "--max_completion_length",
    "6",
    "--save_strategy",
    "no",
    "--disable_tqdm",
    "True",
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A policy, a reward model, prompts to answer and problems to solve."""
    folder = tmp_path_factory.mktemp("files")
    llama().save_pretrained(folder / "policy")
    config = llama().config
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(folder / "scorer")
    for name in ("policy", "scorer"):
        tokenizer().save_pretrained(folder / name)
    rows = [{"prompt": sentence(i, 3)} for i in range(8)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = [{"question": sentence(i, 3), "answer": f"so it is #### {i}"} for i in range(8)]
    (folder / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {path.stem: str(path) for path in folder.iterdir()}


def history(folder: Path) -> list[dict[str, float]]:
    record = json.loads((folder / "log_history.json").read_text(encoding="utf-8"))
    return [row for row in record["log_history"] if "reward" in row]


def test_rlhf_and_its_evaluation(files: dict[str, str], tmp_path: Path) -> None:
    """The reward model's scores are the rewards, the penalty is taken, and the checkpoint can be measured."""
    flags = [
        "--model_name_or_path",
        files["policy"],
        "--reward_model",
        files["scorer"],
        "--dataset_name",
        files["prompts"],
    ]
    rlhf.main([*flags, *SMALL, *SHORT, "--output_dir", str(tmp_path)])
    steps = history(tmp_path)
    assert len(steps) == 2
    assert all(row["grad_reg/penalty_ratio"] > 0 and row["grad_reg/strength"] == 1e-2 for row in steps)
    assert any(row["reward_std"] > 0 for row in steps)

    flags = [
        "--model",
        str(tmp_path),
        "--dataset_name",
        files["prompts"],
        "--dataset_config",
        "",
        "--dataset_split",
        "train",
    ]
    evaluate.main([*flags, "--reward_models", files["scorer"], "--max_completion_length", "4", "--limit", "6"])
    means = json.loads((tmp_path / "evaluation.json").read_text())["means"]
    assert means["scorer"]["count"] == 6
    assert means["scorer"]["standard_error"] > 0


def test_llm_judge_and_its_evaluation(files: dict[str, str], tmp_path: Path) -> None:
    """Format and the judge's grade are rewarded; whether the answer is right is logged, and nothing else."""
    flags = [
        "--model_name_or_path",
        files["policy"],
        "--judge",
        files["policy"],
        "--dataset_name",
        files["problems"],
    ]
    llm_judge.main([*flags, *SMALL, *SHORT, "--output_dir", str(tmp_path), "--unparsable_reward", "-0.5"])
    steps = history(tmp_path)
    assert len(steps) == 2
    for row in steps:
        rewarded = row["rewards/format_reward/mean"] + row["rewards/judge/mean"]
        # trl 0.27 logs the sum without the weights that it trains with.
        logged = rewarded + row["rewards/correctness/mean"] * (trl.__version__ < "1")
        assert row["reward"] == pytest.approx(logged)
        assert row["grad_reg/strength"] == 1e-3

    flags = [
        "--model",
        str(tmp_path),
        "--judge",
        files["policy"],
        "--dataset_name",
        files["problems"],
        "--limit",
        "4",
    ]
    evaluate.main([*flags, "--dataset_split", "train", "--max_completion_length", "4", "--temperature", "0"])
    means = json.loads((tmp_path / "evaluation.json").read_text())["means"]
    assert set(means) == {"length", "format", "correct", "judge"}


def test_rewards_of_a_solution() -> None:
    """The format is all of it, the answer is its number, and the truth stands behind the hashes."""
    right = "<reasoning>2 and 2</reasoning>\n<answer> 1,234 </answer>"
    chat = [{"role": "assistant", "content": right}]
    completions = [right, "it is 1234", "<answer>4</answer>", chat]
    assert judge.format_reward(completions) == [1.0, 0.0, 0.0, 1.0]
    assert judge.correctness(completions, answer=["2+2 #### 1,234"] * 4) == [1.0, 1.0, 0.0, 1.0]
    assert judge.correctness(["no number"], answer=["#### 3"]) == [0.0]
    assert judge.stated_answer("<answer>-3.5</answer>") == -3.5


@pytest.mark.parametrize(
    ("reply", "reward"), [("5", 1.0), ("Grade: 1.", 0.0), ("I give it a 3", 0.5), ("15", -1.0), ("", -1.0)]
)
def test_grades(reply: str, reward: float) -> None:
    """1 to 5 become 0 to 1; anything else is punished."""
    assert judge.Judge(llama(), tokenizer()).reward(reply) == reward


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dataset_name", "no/such/data"], "dataset_name='no/such/data' with split 'train' must be"),
        (["--prompt_column", "text"], "has the columns ['prompt'], and needs ['text']"),
        (["--reward_model", "no/such/model"], "reward_model='no/such/model' must be a folder"),
        (["--no_such_flag", "1"], "must be flags of this script"),
    ],
)
def test_one_line_says_what_is_wrong(files: dict[str, str], flags: list[str], words: str, tmp_path: Path) -> None:
    """The value, the rule and the remedy, and no traceback."""
    given = [
        "--model_name_or_path",
        files["policy"],
        "--reward_model",
        files["scorer"],
        "--dataset_name",
        files["prompts"],
    ]
    with pytest.raises(SystemExit) as stopped:
        rlhf.main([*given, *SMALL, "--output_dir", str(tmp_path), *flags])
    assert words in str(stopped.value)
    assert "\n" not in str(stopped.value)
