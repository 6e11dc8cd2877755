"""Trainers on two ranks, under the engines of Accelerate: their updates are those of one process on the global batch."""

import functools
import importlib.util

import pytest
import torch
import trainer_engine_worker as worker
from distributed import World
from test_trainer_update import EXCLUDED, distance, distinct, formula, norm
from trainers import REAL, assert_same, first_passes, llama

DEEPSPEED = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is an extra")
ENGINES = {
    "ddp": "DistributedDataParallel",
    "fsdp2": "FSDPLlamaForCausalLM",
    "zero0": "DeepSpeedEngine",
    "zero1": "DeepSpeedEngine",
    "zero2": "DeepSpeedEngine",
    "zero3": "DeepSpeedEngine",
}

LOSS = {"plain": "sft"}
# DeepSpeed has no norm to log in stage 0; under FSDP2 the Trainer logs one rank's part of it with older versions of torch.
WITHOUT_NORM = ["zero0"] + ["fsdp2"] * (torch.__version__ < (2, 13))


def on(*engines):
    return pytest.mark.parametrize(
        "engine", [pytest.param(name, marks=DEEPSPEED if name.startswith("zero") else ()) for name in engines]
    )


@pytest.fixture(scope="module")
def world():
    ranks = World(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """What the ranks did in a training, which runs once for all tests that look at it."""

    @functools.cache
    def run(engine, **arguments):
        return world.run(worker.train, tmp_path_factory.mktemp(engine), engine, **arguments)

    def with_defaults(engine, **arguments):
        arguments = {"how": "attach", "kind": "sft", "accumulation": 1, **arguments}
        return run(engine, **dict(sorted(arguments.items())))

    return with_defaults


def assert_updates_are_the_formula(ranks, accumulation, kind="sft", engine=""):
    """Both updates against the float64 reference over the micro-batches of both ranks."""
    first, second = (next(iter(rank["inputs"][0].values())) for rank in ranks)
    assert first.shape != second.shape or not torch.equal(first, second)
    weights = ranks[0]["weights"]
    for step in (0, 1):
        begin = first_passes(kind) * accumulation * step
        window = [batch for rank in ranks for batch in rank["inputs"][begin : begin + accumulation]]
        expected, g1 = formula(LOSS.get(kind, kind), llama(), weights[step], window, **REAL)
        assert distance(expected, g1) > 0.02 * norm(g1)
        update = {name: weights[step][name] - value for name, value in weights[step + 1].items()}
        # Float32 gradients err by some 1e-6 of their norm, which the difference multiplies by γ/ε = 5.
        assert distance(update, expected) < 2e-5 * norm(expected)
        regularized = {name: value for name, value in g1.items() if not any(part in name for part in EXCLUDED)}
        penalty = {name: (expected[name] - value) for name, value in regularized.items()}
        for rank in ranks:  # norms run over all shards, and every rank knows them
            entry = rank["log"][step]
            assert entry["grad_reg/g1_norm"] == pytest.approx(norm(regularized), rel=2e-5)  # as above
            assert entry["grad_reg/penalty_ratio"] == pytest.approx(
                norm(penalty) / norm(regularized), rel=1e-4
            )  # a difference
            if engine not in WITHOUT_NORM:
                assert entry["grad_norm"] == pytest.approx(norm(expected), rel=2e-5)  # the Trainer's: what it would clip


@pytest.mark.parametrize("accumulation", [1, 2])
@on(*ENGINES)
def test_updates_are_those_of_one_process(trained, engine, accumulation):
    """SFT by ``attach``: each update is −g1 − (γ/ε)·(g2 − g1) of the loss over both ranks' micro-batches."""
    ranks = trained(engine, accumulation=accumulation)
    assert [rank["engine"] for rank in ranks] == [ENGINES[engine]] * 2
    assert_updates_are_the_formula(ranks, accumulation, engine=engine)


@pytest.mark.parametrize("accumulation", [1, 2])
@on(*ENGINES)
def test_updates_of_micro_batches(trained, engine, accumulation):
    """Under DistributedDataParallel a micro-batch is a rank's own, and there is one reduction; elsewhere that of both."""
    ranks = trained(engine, accumulation=accumulation, norm_of="micro_batch")
    weights = ranks[0]["weights"]
    for step in (0, 1):
        part = slice(step * accumulation, (step + 1) * accumulation)
        window = [batch for rank in ranks for batch in distinct(rank["inputs"])[part]]
        together = {"norm_of": "micro_batch", "ranks": 1 if engine == "ddp" else 2}
        expected, g1 = formula("sft", llama(), weights[step], window, **{**REAL, **together})
        assert distance(expected, g1) > 0.02 * norm(g1)
        update = {name: weights[step][name] - value for name, value in weights[step + 1].items()}
        assert distance(update, expected) < 2e-5 * norm(expected)  # as above
    if engine == "ddp":  # elsewhere the first rank gathers
        assert_same(ranks[0]["weights"][2], ranks[1]["weights"][2])


@pytest.mark.parametrize("accumulation", [1, 2])
@on("ddp", "zero0", "zero2", "zero3")
def test_given_optimizer_updates_alike(trained, engine, accumulation):
    """The same by ``optimizers=``, where the Trainer takes one, bit for bit what ``attach`` gives."""
    given, attached = (trained(engine, how=how, accumulation=accumulation) for how in ("optimizers", "attach"))
    assert_updates_are_the_formula(given, accumulation, engine=engine)
    for step in (1, 2):
        assert_same(given[0]["weights"][step], attached[0]["weights"][step])


def test_fsdp_needs_attach(world, tmp_path):
    """Under FSDP the Trainer refuses ``optimizers=`` itself: it creates the optimizer, and ``attach`` wraps that."""
    for message in world.run(worker.train_with_given_optimizer, tmp_path, "fsdp2"):
        assert "Passing `optimizers` is not allowed if PyTorch FSDP is enabled" in message


@pytest.mark.parametrize(("kind", "engine"), [("grpo", "ddp"), ("plain", "ddp"), ("plain", "fsdp2")])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_other_trainers_update_alike(trained, kind, engine, accumulation):
    """GRPO, with completions and advantages of its own on each rank, and Transformers' own Trainer."""
    ranks = trained(engine, kind=kind, accumulation=accumulation)
    assert_updates_are_the_formula(ranks, accumulation, kind, engine)


@on("ddp", "fsdp2")
def test_gradients_are_reduced_at_the_end_of_a_window_only(trained, engine):
    """``no_sync`` holds in both passes: of three micro-batches the first two of each pass send no gradient."""
    for rank in trained(engine, accumulation=3, max_steps=1):
        reductions = rank["reductions"]
        assert len(reductions) == 2 * 3
        assert reductions[0] == reductions[1] == reductions[3] == reductions[4] == 0
        assert reductions[2] == reductions[5] > 0


@on(*ENGINES)
def test_first_loss_is_repeated_once_without_a_trace(trained, engine):
    """One forward more in the first two steps, with gradients under FSDP2 alone; all else as without it."""
    arguments = {"how": "attach", "accumulation": 2, "dropout": 0.3}
    checked, unchecked = (trained(engine, checked=yes, **arguments) for yes in (True, False))
    for one, other in zip(checked, unchecked, strict=True):
        assert one["forwards"] == [True, True, engine == "fsdp2", True, True] * 2
        assert other["forwards"] == [True] * 8
        assert torch.equal(one["random"], other["random"])
        assert one["counters"] == other["counters"]
        assert one["timer_kept"]
    for step in (1, 2):
        assert_same(checked[0]["weights"][step], unchecked[0]["weights"][step])


@on("zero0", "zero2", "zero3")
def test_engine_counts_what_it_counts_without_the_penalty(trained, engine):
    """Steps, micro-steps, samples and the throughput timer of DeepSpeed's engine are those of plain training."""
    runs = [trained(engine, how=how, accumulation=2) for how in ("attach", "none")]
    assert runs[0][0]["counters"] == runs[1][0]["counters"]
    assert runs[0][0]["counters"]["global_steps"] == 2


@pytest.mark.parametrize("ranks", [(0, 1), (1,)], ids=["on every rank", "on one rank"])
@on("ddp", "fsdp2", "zero2", "zero3")
def test_loss_with_hidden_state_is_refused_on_every_rank(world, engine, ranks, tmp_path):
    """A loss that cannot be repeated, though it be one rank's alone, stops all ranks at the first step, weights at θ."""
    answers = world.run(worker.train_with_hidden_state, tmp_path, engine, ranks)
    for rank, (message, computed, weights) in enumerate(answers):
        assert message.startswith("Elsewhere: the first loss was ")
        assert ("on another rank" in message) == (rank not in ranks)
        assert computed == 2 + (1 if engine == "fsdp2" else 2)  # without and with gradients enabled
        if weights[0] is not None:
            assert_same(weights[-1], weights[0])


@on(*ENGINES)
def test_what_a_loss_counts_is_counted_once(world, engine, tmp_path):
    """On every rank: objects, arrays, tensors and the trainer's state, in the first pass alone."""
    assert world.run(worker.count_losses, tmp_path, engine, "attach") == [[2 * 2] * 4] * 2


@on("ddp", "zero0", "zero2", "zero3")
def test_a_wrapper_that_the_trainer_creates_is_used(world, trained, engine, tmp_path):
    """``create_optimizer`` may return a wrapper; under DeepSpeed it is rebuilt before the engine takes its parameters."""
    (weights, figures), *_ = world.run(worker.train_created, tmp_path, engine)
    attached = trained(engine)
    assert len(figures) == 2
    assert_same(weights, attached[0]["weights"][2])


@pytest.mark.parametrize("how", ["callback", "late callback"])
@on("ddp", "fsdp2", "zero0", "zero2", "zero3")
def test_a_callback_attaches(trained, engine, how):
    """From the constructor, and when training begins: the weights of ``attach``, bit for bit."""
    found, attached = (trained(engine, how=way)[0] for way in (how, "attach"))
    assert found["engine"] == ENGINES[engine]
    assert len(found["inputs"]) == len(attached["inputs"]) == 2 * 2
    for step in (1, 2):
        assert_same(found["weights"][step], attached["weights"][step])
