"""Trainers of Transformers and TRL: how a wrapper gets to one, by itself or by :func:`attach`, and away from it.

What happens then, in every step, is told in :mod:`gradreg_optim.trainers.attachment`.
"""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any

import transformers.trainer
from torch.optim import Optimizer
from transformers import Trainer

from gradreg_optim.config import GradRegConfig
from gradreg_optim.optimizer import GradRegOptimizer
from gradreg_optim.trainers.adoption import find_wrapper
from gradreg_optim.trainers.attachment import Attachment, attachment_of
from gradreg_optim.versions import warn_outside_range
from gradreg_optim.wrapping.settings import check_settings, exclude_patterns


def attach(trainer: Trainer, config: GradRegConfig | None = None, **settings: Any) -> None:
    """Regularize a trainer's steps; nothing else about the trainer changes.

    Needed when the trainer creates the optimizer itself (model ids, FSDP): whatever ``create_optimizer`` returns is then
    wrapped. Needed by OnlineDPO, NashMD and XPO. Any other trainer that was given a :class:`GradRegOptimizer` as
    ``optimizers=`` attaches by itself when it trains.

    Args:
        trainer: a :class:`transformers.Trainer` or any TRL trainer based on it, before or after training.
        config: the settings, as parsed from a command line.
        settings: keyword arguments of :class:`GradRegOptimizer`; they override ``config``.

    Raises:
        TypeError: ``trainer`` is not a ``transformers.Trainer``, ``config`` not a ``GradRegConfig``, or a setting unknown.
        ValueError: a setting breaks its rule, or settings are given although the trainer's optimizer is a
            :class:`GradRegOptimizer` with its own.
        RuntimeError: the trainer is attached already.
    """
    if not isinstance(trainer, Trainer):
        raise TypeError(
            f"trainer={trainer!r} is a {type(trainer).__name__}: attach() works on transformers.Trainer and TRL trainers. "
            "In a loop of your own, call optimizer.step(closure) instead."
        )
    if config is not None and not isinstance(config, GradRegConfig):
        raise TypeError(
            f"config={config!r} is a {type(config).__name__}: settings come in a GradRegConfig or by name. "
            "Call, for example, attach(trainer, strength=1e-2)."
        )
    if attachment_of(trainer) is not None:
        raise RuntimeError("attach: this trainer is attached already. Call detach(trainer) first.")
    settings = {**(config.kwargs() if config is not None else {}), **settings}
    optimizer = find_wrapper(trainer.optimizer)
    if optimizer is not None and settings:
        raise ValueError(
            f"attach got {sorted(settings)}, but the trainer's optimizer is a GradRegOptimizer with settings of its own. "
            "Give them to one of the two."
        )
    _check(settings)
    Attachment(trainer, optimizer, settings)


def detach(trainer: Trainer) -> None:
    """Undo :func:`attach`: the trainer's methods are its own again, and its optimizer is the one that was wrapped.

    Raises:
        RuntimeError: the trainer is not attached.
    """
    attachment = attachment_of(trainer)
    if attachment is None:
        raise RuntimeError("detach: this trainer is not attached. attach(trainer) comes first.")
    attachment.detach()


def attach_to_caller(optimizer: Optimizer) -> None:
    """Open a micro-batch of the trainer whose ``training_step`` is calling, attached first if need be; else do nothing."""
    frame = sys._getframe(1)
    while frame is not None:
        trainer = frame.f_locals.get("self")
        if isinstance(trainer, Trainer) and (found := find_wrapper(trainer.optimizer)) is optimizer:
            attachment = attachment_of(trainer)
            if attachment is None or attachment.optimizer is not optimizer:
                if attachment is not None:  # the trainer was given another wrapper since
                    attachment.release()
                attachment = Attachment(trainer, found, {})
            attachment.begin_micro_batch()
            return
        frame = frame.f_back  # type: ignore[assignment]


def keep_given_optimizers() -> None:
    """Let trainers under DeepSpeed use the :class:`GradRegOptimizer` that they were given as ``optimizers=``.

    ``transformers.integrations.deepspeed.deepspeed_init`` (4.57 to 5.23) sets ``trainer.optimizer = None`` and has the
    trainer create another one, before anything of the given one is called. Can go when it keeps what it was given.
    """
    module: Any = transformers.trainer
    original = module.deepspeed_init
    if hasattr(original, "keeps_given_optimizers"):
        return

    @functools.wraps(original)
    def deepspeed_init(trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
        given = find_wrapper(trainer.optimizer)
        if given is not None and attachment_of(trainer) is None:
            Attachment(trainer, given, {})
        return original(trainer, *args, **kwargs)

    deepspeed_init.keeps_given_optimizers = True  # type: ignore[attr-defined]
    module.deepspeed_init = deepspeed_init


def _check(settings: dict[str, Any]) -> None:
    """Raise now what :class:`GradRegOptimizer` would raise about its settings when the trainer creates the optimizer."""
    inspect.signature(GradRegOptimizer).bind(None, **settings)
    exclude_patterns(settings.get("exclude"))
    check_settings(**settings)


warn_outside_range("accelerate", "transformers", "trl")
keep_given_optimizers()
