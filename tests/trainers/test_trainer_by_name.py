"""Trainers that build their optimizer from a class and keyword arguments."""

import pytest
from trainers import REAL, assert_same, build, own_figures, penalties, weights
from transformers import Trainer

from gradreg_optim import GradReg, attach


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_it_is_attach(kind, tmp_path):
    """GradReg as ``optimizer_cls_and_kwargs``: weights and logs of ``attach`` to the same optimizer, bit for bit."""
    results = []
    for how in ("attach", "by name", "plain"):
        trainer = build(kind, tmp_path, base=None, gradient_accumulation_steps=2)
        cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
        if how == "attach":
            attach(trainer, **REAL)
        elif how == "by name":
            name = f"{cls.__module__}.{cls.__name__}"
            trainer.optimizer_cls_and_kwargs = (GradReg, {"base_optimizer": name, "gradreg": REAL, **kwargs})
        trainer.train()
        figures = [penalties(trainer, name) for name in ("penalty_ratio", "g1_norm", "g2_norm")]
        results.append((weights(trainer.model), figures, own_figures(trainer)))
    attached, by_name, plain = results
    assert_same(attached[0], by_name[0])
    assert attached[1:] == by_name[1:]
    assert len(by_name[1][0]) == 3
    assert any(not value.equal(plain[0][name]) for name, value in attached[0].items())
