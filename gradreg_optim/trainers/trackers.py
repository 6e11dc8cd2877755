"""Notes the penalty where a run is described: the configuration that trackers keep of it, and the model card.

Relied upon (transformers 4.57 to 5.23): callbacks of trackers hold their module in ``_wandb`` or
``_trackio``, are ``_initialized`` before the first step and update ``config`` with ``allow_val_change=True``;
TensorBoard's has ``tb_writer``.
"""

import inspect
import json
from collections.abc import Callable
from typing import Any

from transformers import Trainer

from gradreg_optim.config import as_flags
from gradreg_optim.wrapping.settings import PER_GROUP, SHARED

TAG = "gradreg_optim"
"""The tag of model cards."""


def tell_trackers(trainer: Trainer, optimizer: Any) -> None:
    """Add the settings that ``optimizer`` trains with to what W&B, trackio and TensorBoard record."""
    if not trainer.state.is_world_process_zero:
        return
    flags = as_flags(_settings_in_use(optimizer))
    for callback in trainer.callback_handler.callbacks:
        tracker = getattr(callback, "_wandb", None) or getattr(callback, "_trackio", None)
        if tracker is not None and getattr(callback, "_initialized", False):
            tracker.config.update(flags, allow_val_change=True)
        writer = getattr(callback, "tb_writer", None)
        if writer is not None:
            writer.add_text("grad_reg", json.dumps(flags, indent=2))


def _settings_in_use(optimizer: Any) -> dict[str, Any]:
    """The settings of the groups, which a checkpoint may have brought; a list where groups differ."""
    groups = optimizer.param_groups
    settings = {"norm_of": optimizer.norm_of, "resample": optimizer.resample, "exclude": optimizer.exclude}
    for name in (*SHARED, *PER_GROUP):
        values = [group[f"gradreg_{name}"] for group in groups]
        settings[name] = values[0] if name in SHARED or values.count(values[0]) == len(values) else values
    return {**settings, "schedule": optimizer._schedule or settings["schedule"]}


def tag_card(create_model_card: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Add :data:`TAG` to the tags of the card that a trainer writes."""
    call = inspect.signature(create_model_card).bind(*args, **kwargs)
    tags = call.arguments.get("tags") or []
    call.arguments["tags"] = [*([tags] if isinstance(tags, str) else tags), TAG]
    create_model_card(*call.args, **call.kwargs)
