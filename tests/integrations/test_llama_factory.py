"""The command for LLaMA-Factory, around a ``run_exp`` that gives callbacks to a trainer as LLaMA-Factory's stages do."""

import pytest
from stacks import plugin
from trainers import REAL, assert_same, build, weights

from gradreg_optim import attach

SETTINGS = {
    "grad_reg_strength": "5e-2",
    "grad_reg_eps": 1e-2,
    "grad_reg_g1_clip": 0,
    "grad_reg_g2_clip": None,
}
"""``REAL``, as YAML has it."""
FLAGS = [
    "--grad_reg_strength",
    "5e-2",
    "--grad_reg_eps=1e-2",
    "--grad_reg_g1_clip",
    "0",
    "--grad_reg_g2_clip",
    "0",
]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the command with what ``read_args`` returns; returns the arguments that are left, and the trainer."""

    def run(arguments):
        found = []

        def run_exp(args=None, callbacks=None):
            trainer = build("sft", tmp_path, base=None, callbacks=callbacks)
            trainer.train()
            found.extend((args, trainer))

        module = plugin(
            monkeypatch,
            "llama_factory",
            llamafactory__hparams={"read_args": lambda: arguments},
            llamafactory__train__tuner={"run_exp": run_exp},
        )
        module.main()
        return found

    return run


@pytest.mark.parametrize(
    ("arguments", "rest"),
    [({"stage": "sft", **SETTINGS}, {"stage": "sft"}), (["--stage", "sft", *FLAGS], ["--stage", "sft"])],
    ids=["file", "flags"],
)
def test_it_trains_as_attached(arguments, rest, run, tmp_path):
    """The weights of ``attach`` bit for bit; LLaMA-Factory gets the arguments that it knows."""
    expected = build("sft", tmp_path, base=None)
    attach(expected, **REAL)
    expected.train()
    left, trainer = run(arguments)
    assert left == rest
    assert_same(weights(trainer.model), weights(expected.model))
    assert sum("grad_reg/penalty_ratio" in entry for entry in trainer.state.log_history) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stage": "sft", "grad_reg_strenght": 1}, "grad_reg_strength"),
        (["--stage", "sft", "--grad_reg_strenght", "1"], "grad_reg_strength"),
        (["--stage", "sft", "--grad_reg_eps=-1"], "eps=-1"),
        ({"stage": "ppo", "grad_reg_strength": 1e-2}, "stage='ppo'.*another stage"),
        (["--stage", "ppo"], "stage='ppo'"),
    ],
)
def test_mistakes_are_refused(arguments, message, run):
    """Before anything is loaded."""
    with pytest.raises(ValueError, match=message):
        run(arguments)


def test_megatron_is_refused(run, monkeypatch):
    """Its engine steps by itself."""
    monkeypatch.setenv("USE_MCA", "1")
    with pytest.raises(ValueError, match="USE_MCA"):
        run({"stage": "sft"})
