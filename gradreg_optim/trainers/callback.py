"""The penalty as a callback, for stacks that take callbacks and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import Trainer, TrainerCallback
from typing_extensions import Unpack  # comes with torch; in typing from Python 3.11

from gradreg_optim.config import GradRegConfig, as_flags
from gradreg_optim.trainers.attach import attach, checked_settings
from gradreg_optim.trainers.attachment import attachment_of
from gradreg_optim.trainers.patches import Patches
from gradreg_optim.wrapping.settings import Settings


class GradRegCallback(TrainerCallback):
    """Attaches the trainer that it is given to: ``SFTTrainer(…, callbacks=[GradRegCallback(strength=1e-2)])``.

    It calls :func:`~gradreg_optim.attach` at the end of the constructor of ``Trainer``. A callback that is added later
    does so when ``train()`` is called. ``detach(trainer)`` also removes the callback.

    Args:
        config: the settings, as parsed from a command line.
        settings: keyword arguments of :class:`~gradreg_optim.GradRegOptimizer`; they override ``config``.

    Raises:
        TypeError, ValueError: a setting is unknown or breaks its rule; or, from the trainer, it is attached already with
            other settings.
        RuntimeError: from the trainer: an earlier training has given the optimizer's parameters to DeepSpeed, or the
            callback was added during training.
    """

    def __init__(self, config: GradRegConfig | None = None, **settings: Unpack[Settings]) -> None:
        self._settings = checked_settings("GradRegCallback", config, settings)
        self._is_attached = False

    def on_train_begin(self, *_args: Any, **_kwargs: Any) -> None:
        """Check that the trainer was attached: callbacks are not told whose they are."""
        if not self._is_attached:
            raise RuntimeError(
                "GradRegCallback: no transformers.Trainer had this callback when its training began. Give it to a trainer "
                "(callbacks=[GradRegCallback(…)]); in a loop of your own, use optimizer.step(closure) or optimizer.passes()."
            )

    def attach_to(self, trainer: Trainer) -> None:
        """Attach ``trainer``, unless it is attached with the same settings."""
        attachment = attachment_of(trainer)
        if attachment is None:
            attach(trainer, **self._settings)
            attachment_of(trainer).patches.callback(self._leave, trainer)  # type: ignore[union-attr]
        elif self._settings and as_flags(self._settings) != as_flags(attachment.adoption.settings):
            raise ValueError(
                "GradRegCallback: the trainer is attached already, with other settings, so these would have no effect. "
                "Give the settings once: to GradRegOptimizer, to attach() or to one GradRegCallback."
            )
        self._is_attached = True

    def _leave(self, trainer: Trainer) -> None:
        """Go when the trainer is detached, so that the next training does not attach it again."""
        if self in trainer.callback_handler.callbacks:
            trainer.remove_callback(self)


def _attach_callbacks(trainer: Trainer) -> None:
    for callback in list(trainer.callback_handler.callbacks):
        if isinstance(callback, GradRegCallback):
            callback.attach_to(trainer)


def _attach_built(init: Callable[..., None], trainer: Trainer, *args: Any, **kwargs: Any) -> None:
    init(trainer, *args, **kwargs)
    _attach_callbacks(trainer)


def _attach_to_train(train: Callable[..., Any], trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
    _attach_callbacks(trainer)
    return train(trainer, *args, **kwargs)


Patches().answer(Trainer, "__init__", _attach_built)
Patches().answer(Trainer, "train", _attach_to_train)
