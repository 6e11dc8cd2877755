"""Beside the path: what a DeepSpeed engine counts, failures, checkpoints, and what is refused."""

import copy
import functools
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("deepspeed", reason="DeepSpeed is an extra")

import zero_worker as worker
from distributed import World
from test_zero import BF16_OPTIMIZER, OFFLOADED, OLD, SETTINGS, TOLERANCE, largest_error, skip_what_is_no_engine


@pytest.mark.parametrize(("stage", "micro_batches"), [(0, 1), (2, 2), (3, 1)])
def test_counts_like_a_plain_engine(pair, stage, micro_batches):
    """Steps, samples, micro-steps, timers and the LR scheduler advance once per step, as without regularization."""
    scheduler = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1, "warmup_num_steps": 10}}
    config = worker.make_config(stage, micro_batches=micro_batches, scheduler=scheduler)
    plain = pair.run(worker.count, config, None, steps=3)
    assert pair.run(worker.count, config, SETTINGS, steps=3) == plain


@pytest.mark.parametrize(
    ("stage", "more"),
    [
        *((stage, {}) for stage in (0, 1, 2, 3)),
        (2, OFFLOADED),
        (3, OFFLOADED),
        (3, {"precision": "bf16"}),
        (1, BF16_OPTIMIZER),
    ],
)
def test_interrupt_in_the_second_pass(pair, stage, more):
    """Weights and masters are whole again, the first gradient is still there, and training goes on."""
    config = worker.make_config(stage, micro_batches=3, **more)
    expected = worker.reference({"strength": 0.0}, steps=2, micro_batches=3, world=2)[0]
    for found in pair.run(worker.interrupt, config, SETTINGS):
        assert found["raised"] == "Interruption"
        assert found["untouched"]
        assert found["whole"]
        assert largest_error(found["with_g1"], expected) < TOLERANCE[more.get("precision", "fp32")]
        assert largest_error(found["after"], found["with_g1"]) > 1e-2


@pytest.mark.parametrize("more", [{"stage": 2}, {"stage": 3}, {"stage": 1, **BF16_OPTIMIZER}], ids=["2", "3", "BF16"])
def test_exception_on_one_rank(more):
    """The others notice when their collective times out, and then the weights are whole on every rank."""
    world = World(2)  # whose connections this breaks
    try:
        ranks = world.run(worker.interrupt, worker.make_config(**more), SETTINGS, on_rank=1)
    finally:
        world.close()
    assert ranks[1]["raised"] == "Interruption"
    assert ranks[0]["raised"] not in ("", "Interruption")
    assert all(found["untouched"] and found["whole"] for found in ranks)


@pytest.mark.parametrize(
    ("stage", "offload", "in_pass"),
    [(1, {}, 2), (2, {}, 1), (3, {}, 1), (3, {}, 2), (2, OFFLOADED["zero"], 1), (2, OFFLOADED["zero"], 2),
     (3, OFFLOADED["zero"], 2)],
)  # fmt: skip
def test_overflow_skips_the_step(pair, stage, offload, in_pass):
    """An overflow in either pass: no step, a lower loss scale, weights at θ, and the next step is taken."""
    if OLD and stage == 3:
        pytest.skip("a plain step of deepspeed 0.18 in fp16 leaves small weights wrong on CPU now and then")
    config = worker.make_config(stage, precision="fp16", fp16={"hysteresis": 1}, zero=offload)
    for found in pair.run(worker.overflow, config, in_pass=in_pass):
        assert found["kept"]
        assert found["whole"]
        assert found["scale"] == 0.5
        assert found["moved"]
        assert found["engine_skipped"] == found["penalties_skipped"] == 1


def test_fp16_where_onednn_has_none(monkeypatch):
    """On CPUs without fp16 in oneDNN, as all are before AVX512-FP16 and AMX-FP16, other cases run as elsewhere."""
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")  # read once in a process: needs ranks of its own
    world = World(2)
    try:
        found = world.run(worker.train, worker.make_config(2, precision="fp16"), SETTINGS, steps=1)[0]
    finally:
        world.close()
    expected = worker.reference(SETTINGS, steps=1, micro_batches=1, world=2)
    assert largest_error(found["masters"][0], expected[0]) < TOLERANCE["fp16"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resumes_from_the_engine_checkpoint(pair, stage, tmp_path):
    """A checkpoint of the engine holds the wrapper's step count; the resumed run has the same bits."""
    skip_what_is_no_engine(stage, "bf16")
    settings = SETTINGS | {"warmup_steps": 3}
    for found in pair.run(worker.resume, worker.make_config(stage, precision="bf16"), settings, str(tmp_path)):
        assert found == {"step": 2, "steps": 2, "same": True}


@pytest.mark.parametrize("stage", [2, 3])
def test_resumes_in_another_world(pair, trio, stage, tmp_path, monkeypatch):
    """A universal checkpoint made by DeepSpeed's own tool continues on more ranks; DeepSpeed refuses any other."""
    from deepspeed.checkpoint import ds_to_universal

    if OLD and stage < 3:
        pytest.skip("a plain engine of deepspeed 0.18 loads a universal checkpoint's second moments as its masters")
    settings = SETTINGS | {"warmup_steps": 3}
    config = worker.make_config(stage)
    straight = pair.run(worker.universal, config, settings, str(tmp_path / "straight"), begin=0, end=4)[0]
    pair.run(worker.universal, config, settings, str(tmp_path), begin=0, end=2)
    arguments = ["--input_folder", str(tmp_path / "saved"), "--output_folder", str(tmp_path / "universal")]
    arguments += ["--num_extract_workers", "1", "--num_merge_workers", "1", "--inject_missing_state"]
    monkeypatch.setattr("sys.argv", ["ds_to_universal", *arguments])
    ds_to_universal.main(ds_to_universal.parse_arguments())
    resumed = trio.run(worker.universal, config, settings, str(tmp_path), begin=2, end=4)[0]
    assert resumed["step"] == 2
    assert largest_error(resumed["masters"], straight["masters"]) < TOLERANCE["fp32"]


@pytest.mark.parametrize(
    ("module", "stage", "attributes", "config"),
    [
        ("storage", 0, "PRIVATE_STAGE_0", {"precision": "bf16"}),
        ("gathered", 2, "PRIVATE", {}),
        ("gathered", 2, "PRIVATE_IF_OFFLOADED", OFFLOADED),
        ("gathered", 1, "PRIVATE_BF16", BF16_OPTIMIZER),
        ("stage3", 3, "PRIVATE", {}),
        ("stage3", 3, "PRIVATE_IF_OFFLOADED", OFFLOADED),
    ],
)
def test_private_attributes_exist(pair, module, stage, attributes, config):
    """DeepSpeed still has every private attribute that gradreg_optim/zero lists."""
    missing = pair.run(worker.missing_attributes, module, stage, attributes, copy.deepcopy(config))[0]
    assert not missing, f"this version of DeepSpeed has no {', '.join(missing)}: see gradreg_optim/zero/{module}.py"


REFUSALS = {
    "a loss scale of 8 in stage 0": {"stage": 0, "optimizer": SimpleNamespace(loss_scale=8.0)},
    "SimpleNamespace": {"optimizer": SimpleNamespace()},  # any other optimizer of DeepSpeed's
    "ZenFlow": {"zenflow": True},
    "mixture of experts": {"has_moe_layers": True},
    "managed_gradient_accumulation": {"managed_gradient_accumulation": False},
    "mics_shard_size": {"mics_shard_size": 2},
    "tensor parallelism": {"stage": 0, "mpu": SimpleNamespace(get_model_parallel_world_size=functools.partial(int, 2))},
    "zero_hpz_partition_size": {"zero_hpz_partition_size": 2},
    "NVMe": {"zero_offload_optimizer": SimpleNamespace(device="nvme")},
    "torch_autocast": {"torch_autocast_z0_gradscaler": object()},
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_refuses_at_construction(pair, reason):
    """What cannot be regularized is refused, with the reason and a way out."""
    message = pair.run(worker.refused, dict(REFUSALS[reason]))[0]
    assert message.startswith("ValueError: engine: ")
    assert reason in message


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"strength": -1.0}, "ValueError: strength=-1.0"),
        ({"exclude": ("no such name",)}, "is part of no parameter name"),
        ({"eps": 0.1, "radius": 0.1}, "both set the length"),
        (
            {"strenght": 0.1},
            "TypeError: ZeroGradRegOptimizer got an unexpected setting 'strenght'. Did you mean 'strength'?",
        ),
        ({"scaler": None}, "TypeError: ZeroGradRegOptimizer got 'scaler', which the engine decides"),
    ],
)
def test_refuses_settings(pair, settings, words):
    """Settings follow the rules of the plain wrapper; parameter names are the model's."""
    assert words in pair.run(worker.refused, {}, settings)[0]


def test_refuses_what_is_no_engine():
    """Anything but an engine is a TypeError that says what to pass."""
    from gradreg_optim import ZeroGradRegOptimizer

    with pytest.raises(TypeError, match=r"engine=Linear: .*deepspeed\.initialize"):
        ZeroGradRegOptimizer(torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("half a window", "ran 0 accumulation"),
        ("two windows", "ran 3 acc"),
        ("no closure", "without a closure"),
        ("step twice", "without a closure"),
    ],
)
def test_refuses_other_closures(pair, kind, words):
    """A closure is exactly one accumulation window."""
    message = pair.run(worker.misuse, kind)[0]
    assert message.startswith("RuntimeError")
    assert words in message
