"""Command lines of benchmarks and examples: what cannot work ends in one clear line, before anything runs."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
for package in ("tqdm", "trl", "matplotlib", "scipy"):
    pytest.importorskip(package, reason=f"{package} belongs to the demo extra")

WRONG = {
    "cost.step_cost": [
        (["--tokens", "100"], "100 must be an integer >= 256 and a multiple of 256"),
        (["--cells", "huge"], "--cells huge: must be part of one of"),
        (["--variants", "lion"], "--variants lion: must be part of one of: base, floor"),
    ],
    "cost.zero_cost": [
        (["--stages", "0"], "invalid choice: 0"),
        (["--ranks", "0"], "0 must be an integer >= 1"),
        (["--width", "100"], "100 must be an integer >= 64 and a multiple of 64"),
        (["--rounds", "many"], "many must be an integer >= 1"),
    ],
    "cost.gpu": [(["--device", "tpu"], "invalid choice: 'tpu'")],
    "precision.__main__": [(["--batches", "policy-7-0"], "'policy-7-0' is no kind-tokens-seed")],
    "hacking.__main__": [
        (["--seeds", "0"], "0 must be an integer >= 1"),
        (["--jobs", "-1"], "-1 must be an integer >= 1"),
    ],
    "trainers.__main__": [(["no-such-python"], "no-such-python must be a file")],
}


@pytest.mark.parametrize(
    ("program", "argv", "words"),
    [(program, argv, words) for program, cases in WRONG.items() for argv, words in cases],
    ids=lambda part: part if isinstance(part, str) and " " not in part else None,
)
def test_wrong_arguments(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    program: str,
    argv: list[str],
    words: str,
) -> None:
    """The last line names the flag's value and the rule; the exit status is that of argparse."""
    module = importlib.import_module(f"benchmarks.{program}")
    monkeypatch.setattr(sys, "argv", ["program", *argv])
    with pytest.raises(SystemExit) as stopped:
        module.main(argv) if module.main.__code__.co_argcount else module.main()
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


EXAMPLES = {
    "examples/own_loop.py": (["--strength", "-1"], "--strength: -1 must be auto, or at least 0"),
    "examples/grpo_loop.py": (["--steps", "0"], "--steps must be at least 1"),
    "examples/accelerate_loop.py": (["--accumulation", "0"], "--accumulation at least 1"),
}
MISSING = {
    "-m benchmarks.cost.step_cost": ("tqdm", ".[demo]"),
    "-m examples.published.rlhf": ("trl", ".[demo]"),
    "examples/accelerate_loop.py": ("accelerate", ".[trl]"),
    "examples/deepspeed_loop.py": ("deepspeed", ".[deepspeed]"),
}


def lines_of_error(folder: Path, *command: str) -> list[str]:
    """What ``python *command`` writes to stderr, with modules in ``folder`` ahead of installed ones."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
    }
    finished = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode in (1, 2)
    return finished.stderr.splitlines()


@pytest.mark.parametrize("program", EXAMPLES)
def test_wrong_arguments_of_examples(tmp_path: Path, program: str) -> None:
    """A value that the optimizer or the loop would refuse is refused with the command line."""
    argv, words = EXAMPLES[program]
    assert words in lines_of_error(tmp_path, program, *argv)[-1]


@pytest.mark.parametrize("program", MISSING)
def test_a_missing_package(tmp_path: Path, program: str) -> None:
    """One line says which, and which extra brings it; there is no traceback."""
    package, extra = MISSING[program]
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules[{package!r}] = None")
    (line,) = lines_of_error(tmp_path, *program.split())
    assert repr(package) in line
    assert f"pip install -e '{extra}'" in line
