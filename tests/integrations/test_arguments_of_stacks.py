"""The settings of the penalty among the arguments of a stack."""

import pytest

from gradreg_optim import PUBLISHED, GradRegConfig
from gradreg_optim.integrations.arguments import NAMES, parted


def test_arguments_are_parted():
    """Settings, as text or as numbers, make a configuration; what is not ours stays, in its order."""
    config, rest = parted(
        {
            "lr": 1,
            "grad_reg_strength": "5e-2",
            "eps": 1e-8,
            "grad_reg_every": "4",
            "grad_reg_exclude": ["norm"],
        }
    )
    assert config == GradRegConfig(grad_reg_strength=5e-2, grad_reg_every=4, grad_reg_exclude=["norm"])
    assert list(rest.items()) == [("lr", 1), ("eps", 1e-8)]
    assert parted({}) == (GradRegConfig(), {})
    published, _ = parted({"grad_reg_published": True})
    assert published.kwargs().items() >= PUBLISHED.items()
    assert set(NAMES) == set(vars(GradRegConfig()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grad_reg_strenght": 1}, "unknown setting 'grad_reg_strenght'. Did you mean 'grad_reg_strength'"),
        ({"gradreg_eps": 1}, "unknown setting 'gradreg_eps'. Did you mean 'grad_reg_eps'"),
        ({"grad_reg": 1}, "unknown setting 'grad_reg'. Names are grad_reg_check_every"),
        ({"grad_reg_eps": -1}, "eps=-1"),
        ({"grad_reg_strength": "high"}, "strength='high'"),
        ({"grad_reg_eps": "1e-2", "grad_reg_radius": 0.1}, "both set the length"),
    ],
)
def test_mistakes_are_refused(arguments, message):
    """A name that nobody would read, and a value that breaks its rule."""
    with pytest.raises(ValueError, match=message):
        parted(arguments)
