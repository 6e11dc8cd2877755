"""The plugin for Axolotl, called as its ``PluginManager`` does, on a configuration made as Axolotl makes it."""

from pkgutil import resolve_name

import pytest
from stacks import plugin
from trainers import REAL, assert_same, build, weights

from gradreg_optim import attach

pydantic = pytest.importorskip("pydantic", reason="Axolotl's configuration is one of pydantic's")

SETTINGS = {
    "grad_reg_strength": "5e-2",
    "grad_reg_eps": 1e-2,
    "grad_reg_g1_clip": 0,
    "grad_reg_g2_clip": None,
}
"""``REAL``, as YAML has it."""


class Base(pydantic.BaseModel):
    """Stands for Axolotl's configuration, which ignores keys that it does not know."""

    learning_rate: float


@pytest.fixture
def loaded(monkeypatch):
    """The plugin, and the function that validates a file's keys: its class is a base, and empty keys are dropped."""
    module = plugin(monkeypatch, "axolotl", axolotl__integrations__base={"BasePlugin": object})
    instance = module.GradRegPlugin()
    config = type("Config", (Base, resolve_name(instance.get_input_args())), {})
    return instance, lambda **keys: config(**{"learning_rate": 1.0, **keys}).model_dump(exclude_none=True)


def test_it_trains_as_attached(loaded, tmp_path):
    """The weights of ``attach`` bit for bit, and its figures in the log."""
    instance, validated = loaded
    expected = build("sft", tmp_path, base=None)
    attach(expected, **REAL)
    expected.train()
    trainer = build("sft", tmp_path, base=None)
    instance.post_trainer_create(validated(**SETTINGS), trainer)
    trainer.train()
    assert_same(weights(trainer.model), weights(expected.model))
    assert sum("grad_reg/penalty_ratio" in entry for entry in trainer.state.log_history) == 3


def test_settings_survive_validation(loaded):
    """Axolotl validates twice, and drops what is None: what was given is there, and defaults are not taken for given."""
    _, validated = loaded
    once = validated(grad_reg_radius=0.1, grad_reg_exclude=["norm"], grad_reg_g1_clip=None)
    assert once == {
        "learning_rate": 1.0,
        "grad_reg_radius": 0.1,
        "grad_reg_exclude": ["norm"],
        "grad_reg_g1_clip": 0,
    }
    assert validated(**once) == once


@pytest.mark.parametrize(
    ("keys", "message"),
    [({"grad_reg_strenght": 1}, "Did you mean 'grad_reg_strength'"), ({"grad_reg_eps": -1}, "eps=-1")],
)
def test_mistakes_are_refused(keys, message, loaded):
    """When the file is read, although Axolotl passes over keys that it does not know."""
    with pytest.raises(pydantic.ValidationError, match=message):
        loaded[1](**keys)
