"""Attaches a wrapper to a trainer of Transformers or TRL: by call, by callback, or when training begins.

:mod:`gradreg_optim.trainers.attachment` describes what an attached trainer does in each step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import transformers.trainer
from torch import Tensor
from transformers import Trainer, TrainerCallback
from typing_extensions import Unpack  # comes with torch; in typing from Python 3.11

from gradreg_optim.config import GradRegConfig, as_flags
from gradreg_optim.trainers.adoption import find_wrapper
from gradreg_optim.trainers.attachment import Attachment, attachment_of
from gradreg_optim.trainers.patches import Patches
from gradreg_optim.wrapping.refusals import check_arguments
from gradreg_optim.wrapping.settings import Settings, check_names, check_settings, exclude_patterns, shown


def attach(trainer: Trainer, config: GradRegConfig | None = None, **settings: Unpack[Settings]) -> None:
    """Regularize a trainer's steps; nothing else about the trainer changes.

    Call it if the trainer creates the optimizer itself (model ids, FSDP): it wraps what ``create_optimizer``
    returns. A trainer that was given a :class:`GradRegOptimizer` as ``optimizers=`` attaches by itself when
    it trains.

    Args:
        trainer: a :class:`transformers.Trainer` or any TRL trainer based on it, before or after training.
        config: the settings, as parsed from a command line.
        settings: keyword arguments of :class:`GradRegOptimizer`; they override ``config``. Patterns in
            ``exclude`` are added to embeddings and heads, which are left out by default; ``"none"`` leaves
            out nothing.

    Raises:
        TypeError: ``trainer`` is not a ``transformers.Trainer``, ``config`` is not a ``GradRegConfig``, or a
            setting is unknown.
        ValueError: a setting breaks its rule, or settings are given although the trainer's optimizer is a
            :class:`GradRegOptimizer`, which has its own.
        RuntimeError: the trainer is attached already, or DeepSpeed holds the parameters of its optimizer.
    """
    if not isinstance(trainer, Trainer):
        raise TypeError(
            f"trainer={shown(trainer)} is a {type(trainer).__name__}: attach() works on "
            "transformers.Trainer and TRL trainers. In a loop of your own, call optimizer.step(closure) "
            "instead."
        )
    given = checked_settings("attach", config, settings)
    if attachment_of(trainer) is not None:
        raise RuntimeError("attach: this trainer is attached already. Call detach(trainer) first.")
    optimizer = find_wrapper(trainer.optimizer)
    if optimizer is not None and given:
        raise ValueError(
            f"attach got {sorted(given)}, but the trainer's optimizer is a GradRegOptimizer with settings "
            "of its own. Pass the settings to one of the two."
        )
    has_engine = getattr(trainer.accelerator, "deepspeed_engine_wrapped", None) is not None
    if optimizer is None and trainer.optimizer is not None and has_engine:
        raise RuntimeError(
            "A DeepSpeed engine holds the parameters of the trainer's optimizer by now: it is too late to "
            "attach. Call attach(trainer), or add a GradRegCallback, before the trainer trains for the "
            "first time."
        )
    Attachment(trainer, optimizer, given)


def checked_settings(where: str, config: GradRegConfig | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of ``config`` and those given to ``where``, checked."""
    if config is not None and not isinstance(config, GradRegConfig):
        raise TypeError(
            f"config={shown(config)} is a {type(config).__name__}: settings are a GradRegConfig or keyword "
            "arguments. Call, for example, "
            f"{where}({'trainer, ' if where == 'attach' else ''}strength=0.3)."
        )
    given: dict[str, Any] = {**(config.kwargs() if config is not None else {}), **settings}
    check_names(where, given)
    exclude_patterns(given.get("exclude"))
    check_arguments(given.get("model"), given.get("scaler"))
    check_settings(**given)
    return given


def detach(trainer: Trainer) -> None:
    """Undo :func:`attach`: restore the trainer's methods, and the optimizer that was wrapped.

    Raises:
        RuntimeError: the trainer is not attached.
    """
    attachment = attachment_of(trainer)
    if attachment is None:
        raise RuntimeError("detach: this trainer is not attached. Call attach(trainer) first.")
    attachment.patches.close()
    attachment.adoption.give_back()


class GradRegCallback(TrainerCallback):
    """Attaches the trainer that has it: ``SFTTrainer(…, callbacks=[GradRegCallback()])``.

    It calls :func:`~gradreg_optim.attach` at the end of the constructor of ``Trainer``. A callback that is
    added later does so when ``train()`` is called. ``detach(trainer)`` also removes the callback.

    Args:
        config: the settings, as parsed from a command line.
        settings: keyword arguments of :class:`~gradreg_optim.GradRegOptimizer`; they override ``config``.

    Raises:
        TypeError, ValueError: a setting is unknown or breaks its rule; or, from the trainer, it is attached
            already with other settings.
        RuntimeError: from the trainer: an earlier training has given the optimizer's parameters to DeepSpeed,
            or the callback was added during training.
    """

    def __init__(self, config: GradRegConfig | None = None, **settings: Unpack[Settings]) -> None:
        self._settings = checked_settings("GradRegCallback", config, settings)
        self._is_attached = False

    def on_train_begin(self, *_args: Any, **_kwargs: Any) -> None:
        """Check that the trainer was attached: callbacks are not told whose they are."""
        if not self._is_attached:
            raise RuntimeError(
                "GradRegCallback: no transformers.Trainer had this callback when its training began. Give "
                "it to a trainer (callbacks=[GradRegCallback(…)]); in a loop of your own, use "
                "optimizer.step(closure) or optimizer.passes()."
            )

    def attach_to(self, trainer: Trainer) -> None:
        """Attach ``trainer``, unless it is attached with the same settings."""
        attachment = attachment_of(trainer)
        if attachment is None:
            attach(trainer, **self._settings)
            attachment_of(trainer).patches.callback(self._leave, trainer)  # type: ignore[union-attr]
        elif self._settings and as_flags(self._settings) != as_flags(attachment.adoption.settings):
            raise ValueError(
                "GradRegCallback: the trainer is attached already, with other settings, so these would "
                "have no effect. Give the settings once: to GradRegOptimizer, to attach() or to one "
                "GradRegCallback."
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


# A trainer that holds a GradRegOptimizer attaches by itself: when it begins to train, before DeepSpeed takes
# the parameters of an optimizer that it has just created, and in its first training step.


def _attach_built(init: Callable[..., None], trainer: Trainer, *args: Any, **kwargs: Any) -> None:
    init(trainer, *args, **kwargs)
    _attach_callbacks(trainer)


def _attach_to_train(train: Callable[..., Any], trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
    _attach_callbacks(trainer)
    attachment, given = attachment_of(trainer), find_wrapper(trainer.optimizer)
    if given is not None and (attachment is None or attachment.is_outdated(given)):
        if attachment is not None:
            attachment.patches.close()
        Attachment(trainer, given, {})
    return train(trainer, *args, **kwargs)


def _attach_to_created(
    deepspeed_init: Callable[..., Any], trainer: Trainer, *args: Any, **kwargs: Any
) -> Any:
    optimizer, scheduler = deepspeed_init(trainer, *args, **kwargs)
    if (created := find_wrapper(optimizer)) is not None and attachment_of(trainer) is None:
        Attachment(trainer, created, {})
    return optimizer, scheduler


def _attach_to_step(step: Callable[..., Tensor], trainer: Trainer, *args: Any, **kwargs: Any) -> Tensor:
    created = find_wrapper(trainer.optimizer) if attachment_of(trainer) is None else None
    if created is None:
        return step(trainer, *args, **kwargs)
    return Attachment(trainer, created, {}).training_step(functools.partial(step, trainer), *args, **kwargs)


# ``deepspeed_init`` (transformers 4.57 to 5.23) calls ``create_optimizer``.
Patches().answer(Trainer, "__init__", _attach_built)
Patches().answer(Trainer, "train", _attach_to_train)
Patches().answer(Trainer, "training_step", _attach_to_step)
Patches().answer(transformers.trainer, "deepspeed_init", _attach_to_created)
