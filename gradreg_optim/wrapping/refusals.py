"""Optimizers and arguments that cannot be wrapped, and passes that cannot be used, each with the reason and a way out."""

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

from gradreg_optim.core.plan import Plan
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


def check_driver(plan: Plan, resample: str, whole: str) -> None:
    """Refuse settings that a driver cannot serve; ``whole`` says of one that it runs all micro-batches at once."""
    if whole and plan.fraction < 1:
        raise RuntimeError(
            f"fraction={plan.fraction!r} takes the difference on some micro-batches of a step; {whole}. "
            "Pass optimizer.step(gradreg_optim.MicroBatches(backward, batches)), or leave fraction at 1."
        )
    if resample != "reuse":
        raise RuntimeError(
            f"resample={resample!r}: completions are reweighted in the losses of trainers, and this step got a "
            "closure, which decides itself what its second call makes of them. Keep the log-probabilities of its first "
            "call there, and leave resample out."
        )


def no_gradient(groups: list[dict[str, Any]], exclude: tuple[str, ...], excluded: list[list[int]]) -> str:
    """The warning about a first pass that left no gradient where one is to be regularized; raises if all is excluded."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    trainable = sum(parameter.requires_grad for parameter in parameters)
    if len(parameters) == sum(map(len, excluded)):
        raise ValueError(
            f"exclude={exclude!r} matches every parameter of the optimizer: nothing is left to regularize. "
            "Pass patterns that match fewer, or strength=0."
        )
    reached = sum(parameter.grad is not None for parameter in parameters)
    return (
        "Gradient regularization: the first pass left no gradient on any parameter that is to be regularized, and the step "
        f"was taken without the penalty. Of the optimizer's {len(parameters)} parameters {trainable} require a gradient and "
        f"{reached} have one, which exclude={exclude!r} or a strength of 0 leaves out. The closure has to call backward() "
        "on a loss that depends on the optimizer's parameters. If the step was meant to have no gradient, nothing is wrong; "
        "this is said once."
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
