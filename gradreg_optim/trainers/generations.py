"""Trainers that generate, score and differentiate in one ``training_step``: OnlineDPO, NashMD and XPO.

For these the second pass repeats the whole ``training_step``. Generation, scoring and judging are not
repeated: the results of the first pass are returned again, and the random numbers continue as they did then.
Only the reference model runs a second time; its weights do not move.

Relied upon (trl 0.27 to 1.16): the names of the class and of the methods below.
"""

from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch

from gradreg_optim.core.same_start import RandomState
from gradreg_optim.trainers.snapshot import copied

_TRAINER = "OnlineDPOTrainer"
_METHODS = (
    "_prepare_inputs",
    "_generate",
    "_generate_vllm",
    "_generate_completions",
    "_calculate_rewards_from_functions",
    "_compute_rewards",
    "_compute_judge",
)

Recorded = tuple[Any, RandomState]  # the result of a call, and the random state after it


class Generations:
    """Records the results of these methods in the first pass, and returns them in the second.

    ``methods`` holds the owner and the name of each; it is empty for any other trainer. Results are appended
    to the list ``recorded``, or read from the iterator ``repeated``, if there is one.
    """

    def __init__(self, trainer: Any, devices: Callable[[], set[torch.device]]) -> None:
        self.methods: list[tuple[Any, str]] = []
        if _TRAINER in [kind.__name__ for kind in type(trainer).__mro__]:
            judge = getattr(trainer, "judge", None)
            self.methods = [(trainer, name) for name in _METHODS if hasattr(trainer, name)]
            self.methods += [(judge, "judge")] if judge else []
        self._devices = devices
        self.recorded: list[Recorded] | None = None
        self.repeated: Iterator[Recorded] | None = None

    def __call__(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return the result of ``method``, or the one of the first pass."""
        if self.repeated is not None:
            result, random = next(self.repeated)
            random.restore()
            return copied(result, with_tensors=True)
        # The methods call one another: record the outermost call only.
        with patch.object(self, "recorded", None):
            result = method(*args, **kwargs)
        if self.recorded is not None:
            # Tensors too: trainers subtract penalties from rewards in place.
            self.recorded.append((copied(result, with_tensors=True), RandomState(self._devices())))
        return result
