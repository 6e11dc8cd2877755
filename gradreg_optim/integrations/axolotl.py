"""Axolotl: a plugin, and every ``grad_reg_*`` is a key of the YAML file. Run with Axolotl 0.19.0.

::

    plugins:
      - gradreg_optim.integrations.axolotl.GradRegPlugin
    grad_reg_strength: auto     # the default

Relied upon (``axolotl/integrations``): the class that ``get_input_args`` names becomes a base of the
configuration's class, and ``post_trainer_create(cfg, trainer)`` is called between the constructor of the
trainer and its training.
"""

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, create_model, model_validator

from gradreg_optim.integrations.arguments import NAMES, parted
from gradreg_optim.trainers.attach import attach


class _Checked(BaseModel):
    @model_validator(mode="before")
    @classmethod
    def _check(cls, data: Any) -> Any:
        """Refuse what breaks a rule before anything is loaded: Axolotl drops unknown and empty keys."""
        parted(data)
        return {**data, **{name: 0 for name in NAMES if name.endswith("_clip") and data.get(name, 0) is None}}


_FIELDS: Any = dict.fromkeys(NAMES, (Any, None))
GradRegArgs = create_model("GradRegArgs", __base__=_Checked, **_FIELDS)


class GradRegPlugin(BasePlugin):  # type: ignore[misc]
    """Attaches each trainer that Axolotl builds."""

    def get_input_args(self) -> str:
        """The full name of the class with the keys."""
        return f"{__name__}.GradRegArgs"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Attach ``trainer`` with the settings in ``cfg``."""
        config, _ = parted({name: value for name, value in cfg.items() if value is not None})
        attach(trainer, config)
