"""ms-swift: registers the optimizer ``gradreg``. Run with ms-swift 4.6.0.

A file ``plugin.py`` with the line ``import gradreg_optim.integrations.ms_swift``, and::

    swift sft --external_plugins plugin.py --optimizer gradreg --optim_args grad_reg_strength=auto …

``--optim`` chooses the optimizer inside, to which the rest of ``--optim_args`` goes. ``gradreg_multimodal``,
``gradreg_galore`` and so on are ms-swift's own ``--optimizer`` with the penalty. Megatron refuses these
names.

Relied upon (``swift/optimizers``): ``optimizers_map[args.optimizer](args, trainer)``, whose
``create_optimizer`` is called before DeepSpeed takes the parameters.
"""

import re
from typing import Any
from unittest.mock import patch

import yaml
from swift.optimizers import OptimizerCallback, optimizers_map

from gradreg_optim.config import GradRegConfig
from gradreg_optim.integrations.arguments import parted
from gradreg_optim.trainers.attach import attach
from gradreg_optim.trainers.attachment import attachment_of


def _parted(optim_args: str | None) -> tuple[GradRegConfig, str | None]:
    """Part ``a=1,b=2,3`` into settings and rest. A comma belongs to a value if no name follows."""
    entries = re.split(r",(?=[^,=]*=)", optim_args.replace(" ", "")) if optim_args else []
    texts = {name: text for name, _, text in (entry.partition("=") for entry in entries)}
    config, rest = parted(
        {name: yaml.safe_load(f"[{text}]" if "," in text else text) for name, text in texts.items()}
    )
    return config, ",".join(f"{name}={texts[name]}" for name in rest) or None


def _regularized(callback: type[OptimizerCallback]) -> type[OptimizerCallback]:
    """The optimizer that ``callback`` creates, attached with the penalty."""

    class GradRegOptimizerCallback(callback):  # type: ignore[misc]
        def __init__(self, args: Any, trainer: Any) -> None:
            super().__init__(args, trainer)
            self._config, self._rest = _parted(args.optim_args)

        def create_optimizer(self, model: Any = None) -> Any:
            with patch.object(self.args, "optim_args", self._rest):
                optimizer = super().create_optimizer(model)
            # ms-swift takes empty groups out of the result; detach() expects the groups that it saw.
            optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
            self.trainer.optimizer = optimizer
            if attachment_of(self.trainer) is None:
                attach(self.trainer, self._config)
            return self.trainer.optimizer

    return GradRegOptimizerCallback


optimizers_map.update(
    {f"gradreg_{name}": _regularized(callback) for name, callback in optimizers_map.items()}
)
optimizers_map["gradreg"] = optimizers_map["gradreg_default"]
