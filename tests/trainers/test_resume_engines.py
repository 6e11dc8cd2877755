"""Trainings on two ranks that stop and go on: bit for bit the uninterrupted ones, and from checkpoints of plain ones."""

import pytest
import resume_worker as worker
import transformers
from distributed import World
from test_trainer_engines import WITHOUT_NORM, on
from trainers import REAL, assert_same


@pytest.fixture(scope="module")
def world():
    ranks = World(2)
    yield ranks
    ranks.close()


OLD = {
    "ddp": "transformers 4.57 cannot load an optimizer's state onto the CPUs of DDP",
    "fsdp2": "plain FSDP2 of transformers 4.57 and accelerate 1.12 goes on from other weights, and not from another's state",
}


@pytest.fixture(autouse=True)
def _can_resume_by_itself(request):
    engine = request.getfixturevalue("engine")
    if transformers.__version__ < "5" and engine in OLD:
        pytest.skip(OLD[engine])


def own(log, engine):
    """A log without clocks, and without what is not of a training as a whole, plain or not: SFT's count of tokens, which
    checkpoints forget, and some norms."""
    foreign = ("_time", "num_tokens", *["grad_norm"] * (engine in WITHOUT_NORM))
    return [{name: value for name, value in entry.items() if not name.endswith(foreign)} for entry in log]


@pytest.mark.parametrize("how", ["optimizers", "attach"])
@on("ddp", "fsdp2", "zero2", "zero3")
def test_resumed_training_is_the_uninterrupted_one(world, engine, how, tmp_path):
    """In a schedule, after a warm-up or without: weights, masters, moments, groups, counters, random numbers and log."""
    if (engine, how) == ("fsdp2", "optimizers"):
        pytest.skip("Under FSDP the Trainer creates the optimizer")
    for rank, (whole, resumed, passes) in enumerate(world.run(worker.interrupted, tmp_path, engine, how)):
        # Passes, micro-batches, steps: the first two were not run again. FSDP2's repeated losses have gradients.
        assert passes == 2 * 2 * 2 + 2 * (engine == "fsdp2")
        assert resumed["counted"]["steps"] == 4
        assert resumed["counted"] == whole["counted"]
        assert resumed["groups"] == whole["groups"]
        assert_same(resumed["tensors"], whole["tensors"])
        # Under DDP norms are a rank's own, and a checkpoint holds the log of the first one.
        begin = 2 if engine == "ddp" and rank else 0
        assert own(resumed["log"][begin:], engine) == own(whole["log"][begin:], engine)
        factors = (0.0, 1 / 3, 2 / 3, 1.0) if how == "optimizers" else (0.25, 0.5, 0.75, 1.0)
        strengths = [entry["grad_reg/strength"] for entry in whole["log"]]
        assert strengths == pytest.approx([REAL["strength"] * factor for factor in factors])  # roundings of 1/3


@on("ddp", "fsdp2", "zero2", "zero3")
def test_plain_checkpoint_loads_with_a_warning(world, engine, tmp_path):
    """A checkpoint written without the wrapper trains on; the warning names what it lacks, and warm-up starts at 0."""
    for said, log, steps in world.run(worker.from_plain, tmp_path, engine):
        if engine == "fsdp2":  # torch completes what a full state lacks from the optimizer itself, which cannot tell
            assert said == []
        else:
            assert len(said) == 1
            for name in ("gradreg_strength", "gradreg_step", "saved without GradRegOptimizer"):
                assert name in said[0]
        assert steps == 2
        strengths = [entry["grad_reg/strength"] for entry in log if "grad_reg/strength" in entry]
        assert strengths == pytest.approx([0.0, REAL["strength"] / 3])  # rounding of 1/3
