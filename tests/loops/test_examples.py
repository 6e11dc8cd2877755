"""The short examples, run as their docstrings say; each compares its weights with a closed form and fails if they differ."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from distributed import free_port, remove_shared_memory

import gradreg_optim

ROOT = Path(gradreg_optim.__file__).parents[1]
AGREES = "agree with the closed form"


def output_of(*command: str, **environment: str) -> str:
    """What ``python *command`` prints, run from the root of the repository; it must end without an error."""
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    settings["PATH"] = os.pathsep.join(
        [str(Path(sys.executable).parent), os.environ["PATH"]]
    )  # ninja, which DeepSpeed calls
    finished = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, **settings, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-5000:]
    return finished.stdout


def test_own_loop() -> None:
    """Both ways to train agree with the formula: passes() with clipping, and a closure."""
    assert output_of("examples/own_loop.py").count(AGREES) == 2


@pytest.mark.parametrize(("strength", "gain"), [("0", 0.3), ("0.1", 0.3), ("auto", 0.1)])
def test_grpo_loop(strength: str, gain: float) -> None:
    """The policy learns, with and without the penalty, which is there in every step."""
    output = output_of("examples/grpo_loop.py", "--strength", strength)
    first, last = map(float, re.findall(r"the mean reward went from (\S+) to (\S+)", output)[0])
    assert last > first + gain
    ratios = [float(ratio) for ratio in re.findall(r"penalty ratio (\S+),", output)]
    assert [ratio > 0 for ratio in ratios] == [strength != "0"] * 7
    assert output.count("skipped 0") == 7


@pytest.mark.skipif(find_spec("accelerate") is None, reason="Accelerate comes with the extra [trl]")
@pytest.mark.parametrize("accumulation", ["1", "2"])
def test_accelerate_loop(accumulation: str) -> None:
    """On one process, with and without accumulation."""
    output = output_of("examples/accelerate_loop.py", "--cpu", "--epochs", "15", "--accumulation", accumulation)
    assert AGREES in output


@pytest.mark.skipif(find_spec("accelerate") is None, reason="Accelerate comes with the extra [trl]")
def test_accelerate_loop_on_two_processes() -> None:
    """Each process has half of the data, and the weights are those of one process on all of it."""
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    output = output_of(*launch, "examples/accelerate_loop.py", "--cpu", "--epochs", "15")
    assert re.search(rf"processes: 2; γ = \d.*{AGREES}", output)


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is an extra")
@pytest.mark.parametrize("stage", ["2", "3"])
def test_deepspeed_loop(stage: str) -> None:
    """On two processes over gloo."""
    port = free_port()
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    try:
        output = output_of(*launch, "examples/deepspeed_loop.py", "--stage", stage, DS_ACCELERATOR="cpu")
    finally:
        remove_shared_memory(port)
    assert re.search(rf"processes: 2; γ = \d.*{AGREES}", output)


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib belongs to the demo extra")
@pytest.mark.parametrize("name", ["grpo", "published.rlhf", "published.llm_judge", "published.evaluate"])
def test_modules_start(name: str) -> None:
    """Started as a module, each lists its flags."""
    assert "--model" in output_of("-m", f"examples.{name}", "--help")
