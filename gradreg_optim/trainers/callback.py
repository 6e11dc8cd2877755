"""The penalty as a callback, for stacks that take callbacks and nothing else."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback
from typing_extensions import Unpack  # comes with torch; in typing from Python 3.11

from gradreg_optim.config import GradRegConfig, as_flags
from gradreg_optim.trainers.attach import attach, calling_trainers, checked_settings
from gradreg_optim.trainers.attachment import attachment_of
from gradreg_optim.wrapping.settings import Settings


class GradRegCallback(TrainerCallback):
    """Attaches the trainer that it is given to: ``SFTTrainer(…, callbacks=[GradRegCallback(strength=1e-2)])``.

    The same as :func:`~gradreg_optim.attach` at the end of the trainer's constructor. A callback that is added later
    attaches when training begins, which is too late under DeepSpeed. ``detach(trainer)`` also removes the callback.

    Args:
        config: the settings, as parsed from a command line.
        settings: keyword arguments of :class:`~gradreg_optim.GradRegOptimizer`; they override ``config``.

    Raises:
        TypeError, ValueError: a setting is unknown or breaks its rule; or, from the trainer, it is attached already with
            other settings.
        RuntimeError: from the trainer: DeepSpeed holds the optimizer's parameters by the time that training begins.
    """

    def __init__(self, config: GradRegConfig | None = None, **settings: Unpack[Settings]) -> None:
        self._settings = checked_settings("GradRegCallback", config, settings)

    def on_init_end(self, *_args: Any, **_kwargs: Any) -> None:
        """Attach the trainer whose constructor is calling."""
        self._attach()

    def on_train_begin(self, *_args: Any, **_kwargs: Any) -> None:
        """Attach the trainer if it was built without this callback."""
        self._attach()

    def _attach(self) -> None:
        trainer = next((trainer for trainer in calling_trainers() if self in trainer.callback_handler.callbacks), None)
        if trainer is None:
            raise RuntimeError(
                "GradRegCallback: no transformers.Trainer that has this callback is calling it. Give it to a trainer "
                "(callbacks=[GradRegCallback(…)]); in a loop of your own, use optimizer.step(closure) or optimizer.passes()."
            )
        attachment = attachment_of(trainer)
        if attachment is None:
            attach(trainer, **self._settings)
            attachment_of(trainer).hooks.callback(self._leave, trainer)  # type: ignore[union-attr]
        elif self._settings and as_flags(self._settings) != as_flags(attachment.adoption.settings):
            raise ValueError(
                "GradRegCallback: the trainer is attached already, with other settings, so these would have no effect. "
                "Give the settings once: to GradRegOptimizer, to attach() or to one GradRegCallback."
            )

    def _leave(self, trainer: Trainer) -> None:
        """Go when the trainer is detached, so that the next training does not attach it again."""
        if self in trainer.callback_handler.callbacks:
            trainer.remove_callback(self)
