"""What trainers leave out of the penalty: embeddings and heads, found as modules rather than by name."""

from contextlib import suppress
from typing import Any

from torch import nn

from gradreg_optim.wrapping.exclusion import NOTHING

HEADS = ("score", "classifier", "v_head", "value_head", "reward_head")
"""Attributes under which Transformers and TRL keep value, reward and classification heads."""

# Attributes in which DDP, compilation, PEFT, Transformers and value heads keep the model that they wrap.
_INSIDE = ("module", "_orig_mod", "base_model", "model", "pretrained_model")


def added_exclusion(exclude: tuple[str, ...], model: Any) -> list[nn.Parameter]:
    """Return what is left out besides the patterns ``exclude``; with ``"none"`` that is nothing.

    It is the parameters of input and output embeddings, and of value, reward and classification heads.
    """
    if exclude == NOTHING:
        return []
    layers: list[nn.Module] = [model]
    found: list[Any] = []
    # The loop appends to it: PEFT, value heads, DDP and compilation all wrap the real model.
    for layer in layers:
        for name in _INSIDE:
            inner = getattr(layer, name, None)
            if isinstance(inner, nn.Module) and all(inner is not known for known in layers):
                layers.append(inner)
        found += [getattr(layer, name, None) for name in HEADS]
        for name in ("get_input_embeddings", "get_output_embeddings"):
            # A Transformers model may have no such embeddings.
            with suppress(AttributeError, NotImplementedError):
                found.append(getattr(layer, name)())
    return [
        parameter for module in found if isinstance(module, nn.Module) for parameter in module.parameters()
    ]
