"""Trainers under ``accelerate launch`` with DeepSpeed, against the same trainers under DistributedDataParallel."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed import free_port, remove_shared_memory

pytest.importorskip("deepspeed", reason="DeepSpeed is an extra")
pytest.importorskip("trl", reason="trainers come with the extra [trl]")

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests" / "support"
CONFIGS = ROOT / "examples" / "grpo"
CASES = ["sft:optimizers:1", "sft:optimizers:4", "sft:attach:4", "grpo:optimizers:1", "grpo:attach:4"]
PLAIN = "sft:none:4"
BF16 = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,
    "communication_data_type": "fp32",  # gloo sums no half precision
}


def launch(module, *options, script_arguments):
    """Run tests/support/zero_script.py in two processes; where the test ends before they do, they are killed."""
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(SUPPORT), os.environ.get("PYTHONPATH", "")]),
        "PYTHONWARNINGS": "ignore",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),  # ninja, which DeepSpeed calls
    }
    command = [
        sys.executable,
        "-m",
        module,
        *map(str, options),
        str(SUPPORT / "zero_script.py"),
        *map(str, script_arguments),
    ]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            output, _ = process.communicate()
        except BaseException:
            os.killpg(process.pid, 9)
            raise
        finally:
            remove_shared_memory(options[[str(option).endswith("port") for option in options].index(True) + 1])
    assert process.returncode == 0, output[-5000:]


@pytest.fixture(scope="module")
def under_ddp(tmp_path_factory):
    file = tmp_path_factory.mktemp("ddp") / "found.pt"
    options = ["--nproc_per_node", 2, "--master_port", free_port()]
    launch("torch.distributed.run", *options, script_arguments=[*CASES, PLAIN, file])
    return torch.load(file)


@pytest.fixture(scope="module", params=[1, 2, 3])
def under_deepspeed(request, tmp_path_factory):
    file = tmp_path_factory.mktemp("zero") / "found.pt"
    options = [
        "--config_file",
        CONFIGS / f"zero{request.param}.yaml",
        "--mixed_precision",
        "no",
        "--main_process_port",
        free_port(),
    ]
    launch("accelerate.commands.launch", *options, script_arguments=[*CASES, file])
    return torch.load(file)


def test_trains_as_under_ddp(under_deepspeed, under_ddp):
    """By ``optimizers=`` and by ``attach``, SFT and GRPO, accumulation 1 and 4: the weights of the DDP run in fp32."""
    for case in CASES:
        found, expected = under_deepspeed[case], under_ddp[case]
        assert (found["engine"], expected["engine"]) == ("DeepSpeedEngine", "DistributedDataParallel")
        assert found["weights"]
        for name, value in found["weights"].items():
            # fp32: sums over ranks in another order, for three steps
            torch.testing.assert_close(value, expected["weights"][name], rtol=0, atol=2e-6)


def test_penalty_changes_the_weights(under_ddp):
    """The runs above are not plain training."""
    regularized, plain = under_ddp["sft:optimizers:4"]["weights"], under_ddp[PLAIN]["weights"]
    assert max(float((regularized[name] - plain[name]).abs().max()) for name in plain) > 1e-3


def test_trains_in_bf16(under_ddp, tmp_path):
    """In bf16, as a DeepSpeed JSON describes it: near the fp32 weights, which are not what plain training ends with."""
    config, file = tmp_path / "zero2.json", tmp_path / "found.pt"
    config.write_text(json.dumps(BF16))
    options = ["--use_deepspeed", "--num_processes", 2, "--num_machines", 1, "--deepspeed_config_file", config]
    options += ["--main_process_port", free_port()]
    launch("accelerate.commands.launch", *options, script_arguments=["sft:optimizers:1:bf16", "sft:none:1:bf16", file])
    regularized, plain = (torch.load(file)[f"sft:{how}:1:bf16"]["weights"] for how in ("optimizers", "none"))
    expected = under_ddp["sft:optimizers:1"]["weights"]

    def distance(weights):
        return float(sum((weights[name].float() - expected[name]).square().sum() for name in expected).sqrt())

    for value in regularized.values():
        torch.testing.assert_close(value, value.bfloat16().float(), rtol=0, atol=0)
    assert distance(regularized) < 0.1 * distance(plain)  # 0.04 with 8 bits in forward, gradients and weights


def test_logs_as_under_ddp(under_deepspeed, under_ddp):
    """``grad_reg/*`` and the trainer's own figures are logged, those of the combined gradient among them."""
    for case in CASES:
        steps, expected = ([entry for entry in run[case]["log"] if "loss" in entry] for run in (under_deepspeed, under_ddp))
        assert len(steps) == len(expected) == 3
        for ours, theirs in zip(steps, expected, strict=True):
            assert {name for name in ours if name.startswith("grad_reg/")} == {
                n for n in theirs if n.startswith("grad_reg/")
            }
            for name in ("loss", "grad_norm", "num_tokens", "grad_reg/penalty_ratio", "grad_reg/cosine", "grad_reg/g2_norm"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5)  # a ratio of differences in fp32
