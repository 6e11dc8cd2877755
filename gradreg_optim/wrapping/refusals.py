"""Optimizers and arguments that cannot be wrapped, each with the reason and a way out."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from gradreg_optim.wrapping.settings import shown

STEPS_IN_BACKWARD = re.compile("(?i)lomo|layerwise|inbackward|gradientrelease|cpuoffloadoptimizer|^dummyoptimizer$")
"""Names of classes whose update, or whose copy of the gradient, is taken in hooks of the backward: LOMO and AdaLomo; what
Transformers and LLaMA-Factory put in the place of layerwise GaLore and APOLLO; torchtitan's and torchao's.
"""
TAKES_GRADIENTS = re.compile("SAM$|^AliG$")
"""Names of classes that run the closure themselves; most of them only say so in their first step."""


def check_wrappable(optimizer: Any) -> None:
    """Refuse what cannot be wrapped, before anything is changed."""
    name = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        remedy = "Pass, for example, torch.optim.AdamW(model.parameters())."
        if type(optimizer).__module__.startswith("deepspeed."):
            remedy = "The engine holds the parameters by now: use ZeroGradRegOptimizer(engine), or attach(trainer) earlier."
        raise TypeError(
            f"optimizer={shown(optimizer)} is a {name}: an instance of torch.optim.Optimizer is wrapped. {remedy}"
        )
    if TAKES_GRADIENTS.search(name) or _insists_on_closure(inspect.unwrap(type(optimizer).step)):
        raise ValueError(
            f"optimizer={name}: its step needs a closure of its own, but the combined gradient "
            "exists at one point only. Use an optimizer that steps on gradients, such as AdamW or SGD."
        )
    if (
        STEPS_IN_BACKWARD.search(name)
        or getattr(optimizer, "defaults", {}).get("gradient_release")  # optimi
        or getattr(optimizer, "_overlap_with_ddp", False)  # ZeroRedundancyOptimizer
        or any(hasattr(p, "_in_backward_optimizers") for group in optimizer.param_groups for p in group["params"])
    ):
        raise ValueError(
            f"optimizer={name}: it takes its steps in the backward, before there is a second gradient to combine with. "
            "Use one that steps when it is called, such as AdamW, or GaLore without layerwise updates."
        )


def check_arguments(model: Any, scaler: Any) -> None:
    """Refuse what is no module, and what scales no losses."""
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(
            f"model={shown(model)} is a {type(model).__name__}: names and buffers are those of a torch.nn.Module. "
            "Pass the module."
        )
    if scaler is not None and not callable(getattr(scaler, "get_scale", None)):
        raise TypeError(
            f"scaler={shown(scaler)} is a {type(scaler).__name__}: losses are scaled by a torch.amp.GradScaler. "
            "Pass the one that your closure calls scale() of, or leave it out."
        )


@functools.cache
def _insists_on_closure(step: Callable[..., Any]) -> bool:
    """Whether ``step`` has an argument without a default, or begins by refusing to go without a closure."""
    parameters = list(inspect.signature(step).parameters.values())[1:]
    if any(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        return True
    try:
        definition: Any = ast.parse(textwrap.dedent(inspect.getsource(step))).body[0]
    except (OSError, TypeError, SyntaxError):  # compiled, or written into a prompt
        return False
    for statement in getattr(definition, "body", []):
        test = ast.unparse(getattr(statement, "test", ast.Constant(None)))
        if isinstance(statement, ast.Assert) and test in ("closure is not None", "closure", "callable(closure)"):
            return True
        if isinstance(statement, ast.If) and test in ("closure is None", "not closure"):
            return isinstance(statement.body[-1], ast.Raise)
    return False
