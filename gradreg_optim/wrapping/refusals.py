"""Optimizers, arguments and engines that cannot be regularized, each with the reason and a way out."""

import gc
import inspect
import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from gradreg_optim.wrapping.settings import shown

STEPS_IN_BACKWARD = re.compile(
    "(?i)lomo|layerwise|inbackward|gradientrelease|cpuoffloadoptimizer|^dummyoptimizer$"
)
"""Names of classes that step, or copy gradients, in hooks of the backward.

They are LOMO and AdaLomo; what Transformers and LLaMA-Factory put in the place of layerwise GaLore and
APOLLO; torchtitan's and torchao's.
"""
TAKES_GRADIENTS = re.compile("SAM$|^AliG$|^DPOptimizer$")
"""Names of classes that run the closure themselves, or that write ``.grad`` in their step (Opacus)."""


def check_wrappable(optimizer: Any) -> None:
    """Refuse what cannot be wrapped, before anything is changed."""
    name = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        remedy = "Pass, for example, torch.optim.AdamW(model.parameters())."
        if type(optimizer).__module__.startswith("deepspeed."):
            remedy = (
                "The engine holds the parameters by now: use ZeroGradRegOptimizer(engine), or "
                "attach(trainer) earlier."
            )
        raise TypeError(
            f"optimizer={shown(optimizer)} is a {name}: an instance of "
            f"torch.optim.Optimizer is wrapped. {remedy}"
        )
    if any(TAKES_GRADIENTS.search(kind.__name__) for kind in type(optimizer).__mro__) or _needs_closure(
        optimizer
    ):
        raise ValueError(
            f"optimizer={name}: its step needs a closure, or makes the gradient by itself, but the "
            "combined gradient exists at one point only. Use an optimizer that steps on gradients, "
            "such as AdamW or SGD."
        )
    if (
        STEPS_IN_BACKWARD.search(name)
        or getattr(optimizer, "defaults", {}).get("gradient_release")  # optimi
        or getattr(optimizer, "_overlap_with_ddp", False)  # ZeroRedundancyOptimizer
        or any(
            hasattr(p, "_in_backward_optimizers") for group in optimizer.param_groups for p in group["params"]
        )
    ):
        raise ValueError(
            f"optimizer={name}: it takes its steps in the backward, before there is a second "
            "gradient to combine with. Use one that steps when it is called, such as AdamW, or "
            "GaLore without layerwise updates."
        )


def check_arguments(model: Any, scaler: Any) -> None:
    """Refuse what is no module, and what scales no losses."""
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(
            f"model={shown(model)} is a {type(model).__name__}: names and buffers are those of a "
            "torch.nn.Module. Pass the module."
        )
    if scaler is not None and not callable(getattr(scaler, "get_scale", None)):
        raise TypeError(
            f"scaler={shown(scaler)} is a {type(scaler).__name__}: losses are scaled by a "
            "torch.amp.GradScaler. Pass the one that your closure calls scale() of, or leave it out."
        )


def check_micro_batches(number: Any, done: int, begun: int, norm_of: str | None, is_whole: bool) -> None:
    """Refuse a number of micro-batches that is none, or another than the step of ``done`` has begun with.

    ``is_whole``: nobody has touched the sum of the gradients so far.
    """
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ValueError(
            f"micro_batches={shown(number)}: it must be an integer >= 1, the number of loops over passes() "
            "before step()."
        )
    if number > 1 and norm_of == "step":
        raise ValueError(
            f"micro_batches={number} and norm_of='step': the norm of the whole step needs all of it in each "
            "pass. Run all micro-batches in the body of one loop over passes(), or leave norm_of out."
        )
    if done and number != begun:
        raise ValueError(
            f"micro_batches={number} after {done} of {begun} micro-batches: their number holds for a whole "
            "step. Call step() after all of them, or zero_grad() to begin the step again."
        )
    if done and not is_whole:
        raise RuntimeError(
            f"the gradients were changed after {done} of {begun} micro-batches: .grad held their sum. Clear "
            "gradients inside the loop over passes() alone, clip after the last loop, or call the "
            "optimizer's zero_grad() to begin the step again."
        )


def check_complete(done: int, begun: int, was_under_way: bool) -> None:
    """Refuse a step in the middle of a loop over passes, or after some of its micro-batches."""
    if was_under_way:
        raise RuntimeError(
            "step() was called before the passes of this step ended: .grad does not hold the combined "
            "gradient. Let the loop over optimizer.passes() run to its end, and call step() after it."
        )
    if done:
        raise RuntimeError(
            f"step() was called after {done} of {begun} micro-batches: .grad holds their sum alone. Loop "
            "over optimizer.passes(micro_batches=n) once for each of the n micro-batches of a step, or call "
            "optimizer.zero_grad() to begin the step again; for a last step of fewer, pass their number."
        )


def check_resample(resample: str | None) -> None:
    """Refuse completions to be reweighted in a loop of the user's own."""
    if resample == "sequence":
        raise RuntimeError(
            f"resample={resample!r}: completions are reweighted in the losses of trainers, and this step got "
            "a closure or a loop over passes(), which decides itself what its second pass makes of them. Use "
            "gradreg_optim.reweighted there, and leave resample out."
        )


def no_gradient(groups: list[dict[str, Any]], exclude: tuple[str, ...], excluded: list[list[int]]) -> str:
    """The warning for a first pass that left no gradient to regularize; raises if all is excluded."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    trainable = sum(parameter.requires_grad for parameter in parameters)
    if len(parameters) == sum(map(len, excluded)):
        raise ValueError(
            f"exclude={exclude!r} matches every parameter of the optimizer: nothing is left to regularize. "
            "Pass patterns that match fewer, or strength=0."
        )
    reached = sum(parameter.grad is not None for parameter in parameters)
    return (
        "Gradient regularization: the first pass left no gradient on any parameter that is to be "
        "regularized, and the step was taken without the penalty. Of the optimizer's "
        f"{len(parameters)} parameters {trainable} require a gradient and {reached} have one, which "
        f"exclude={exclude!r} or a strength of 0 leaves out. The closure has to call backward() on a "
        "loss that depends on the optimizer's parameters. If the step was meant to have no gradient, "
        "nothing is wrong; this is said once."
    )


def _needs_closure(optimizer: Optimizer) -> bool:
    parameters = list(inspect.signature(inspect.unwrap(type(optimizer).step)).parameters.values())[1:]
    return any(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


def check_engines(groups: list[dict[str, Any]]) -> None:
    """Refuse engines that hold the parameters of ``groups`` and would make a step wrong without an error."""
    parameters = {id(parameter): parameter for group in groups for parameter in group["params"]}
    if any(getattr(parameter, "_fsdp_flattened", False) for parameter in parameters.values()):
        # Private, and imported already by whoever flattened the parameters: nothing on them says
        # whether they are shards.
        from torch.distributed.fsdp._flat_param import FlatParamHandle

        for handle in _living(FlatParamHandle):
            parts: tuple[Tensor, ...] = (
                handle.flat_param,
                *(getattr(handle.flat_param, "_params", None) or ()),
            )
            if handle.uses_sharded_strategy and any(id(part) in parameters for part in parts):
                raise ValueError(
                    "the parameters are shards of FSDP1 (FullyShardedDataParallel): norms would be those of "
                    "this rank's shards alone. Use FSDP2 (torch.distributed.fsdp.fully_shard; fsdp_version=2 "
                    "in Accelerate and Transformers)."
                )
    for model in _living(DistributedDataParallel):
        states = [state for _, state in getattr(model, "_comm_hooks", ())]
        is_lossy = any(kind.__name__ == "PowerSGDState" for state in states for kind in type(state).__mro__)
        if is_lossy and any(id(parameter) in parameters for parameter in model.parameters()):
            raise ValueError(
                "the communication hook PowerSGD compresses gradients and adds what it lost to the next "
                "ones: g2 − g1 would be that error. Use DistributedDataParallel without it, or with "
                "fp16_compress_hook or bf16_compress_hook."
            )


def _living(kind: type) -> Iterator[Any]:
    """Every object of that class: neither parameters nor reducers know who holds them."""
    return (entry for entry in gc.get_objects() if issubclass(type(entry), kind))
