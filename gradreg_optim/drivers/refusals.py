"""What is said of a closure, or the body of a loop, that cannot serve the settings or leaves no gradient."""

from __future__ import annotations

from typing import Any

from gradreg_optim.core.plan import Plan


def check_driver(plan: Plan, resample: str, whole: str) -> None:
    """Refuse settings that a driver cannot serve; ``whole`` says of one that it runs all micro-batches at once.

    Raises:
        RuntimeError: ``fraction`` or ``resample`` ask for more than the driver knows.
    """
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
    """The warning about a first pass that left no gradient on any parameter that is to be regularized.

    Raises:
        ValueError: there is no such parameter, because ``exclude`` leaves out all.
    """
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
