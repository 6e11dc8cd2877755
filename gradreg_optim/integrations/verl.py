"""verl: the penalty in its FSDP engine, on FSDP2. Run with verl 0.9.1 (its SFT trainer, on a CPU).

For the actor, and likewise for ``critic`` and, without the prefix, for ``verl.trainer.sft_trainer``::

    actor_rollout_ref.model.external_lib=gradreg_optim.integrations.verl
    actor_rollout_ref.actor.strategy=fsdp2
    +actor_rollout_ref.actor.optim.override_optimizer_config.grad_reg_strength=auto

``optim`` chooses the optimizer inside. One ``grad_reg_*`` key switches the penalty on. Embeddings and value
heads are left out of the penalty, as in trainers. Unlike there, the norm is that of the whole step, and the
second pass takes completions as they are. What a step reports is of its first pass, beside ``grad_reg/…``.
On other engines (Megatron, VeOmni) the keys are an error, as they are without ``external_lib``.

Relied upon (``verl/workers/engine``): ``FSDPEngine._build_optimizer(module)``; ``forward_backward_batch``,
before which ``BaseEngine.train_batch`` clears the gradients, and after which it clips them and steps.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from verl.workers.config.optimizer import build_optimizer
from verl.workers.engine.base import BaseEngine
from verl.workers.engine.fsdp.transformer_impl import FSDPEngine

from gradreg_optim.integrations.arguments import of_penalty, parted
from gradreg_optim.optimizer import GradRegOptimizer
from gradreg_optim.trainers.exclusion import added_exclusion
from gradreg_optim.trainers.patches import Patches


def _build_optimizer(build: Callable[..., Any], engine: Any, module: Any) -> Any:
    """The optimizer of the configuration, inside a :class:`GradRegOptimizer` if there are settings."""
    config = engine.optimizer_config
    override = config.override_optimizer_config or {}
    if not of_penalty(override):
        return build(engine, module)
    settings, rest = parted(override)
    inside = build_optimizer(module.parameters(), replace(config, override_optimizer_config=rest))
    optimizer = GradRegOptimizer(inside, **settings.kwargs(), model=module, scaler=engine.scaler)
    optimizer.leave_out(added_exclusion(optimizer.exclude, module))
    return optimizer


def _forward_backward(
    run: Callable[..., Any], engine: Any, data: Any, loss_function: Any, forward_only: bool = False
) -> Any:
    """The passes of one step; returns what the first one returned.

    Raises:
        RuntimeError: there is a gradient already, to which this batch would be added.
    """
    optimizer = engine.optimizer
    if forward_only or not isinstance(optimizer, GradRegOptimizer):
        return run(engine, data, loss_function, forward_only=forward_only)
    if any(parameter.grad is not None for group in optimizer.param_groups for parameter in group["params"]):
        raise RuntimeError(
            "forward_backward_batch was called twice without a step in between: the second pass would "
            "repeat the last batch alone. Give the whole batch to one call, which splits it into "
            "micro-batches, or leave out grad_reg_*."
        )
    first = None
    for _ in optimizer.passes():
        engine.optimizer_zero_grad()
        output = run(engine, data, loss_function, forward_only=False)
        first = output if first is None else first
    if first:
        first["metrics"].update(
            {f"grad_reg/{name}": [float(value)] for name, value in optimizer.metrics.items()}
        )
    return first


def _train_batch(train: Callable[..., Any], engine: Any, *args: Any, **kwargs: Any) -> Any:
    """Train, unless the engine passed over the settings.

    Raises:
        RuntimeError: it did.
    """
    if not isinstance(engine.optimizer, GradRegOptimizer) and of_penalty(
        getattr(engine.optimizer_config, "override_optimizer_config", None) or {}
    ):
        raise RuntimeError(
            f"{type(engine).__name__} built its optimizer without the settings grad_reg_*, which would have "
            "no effect. Use strategy=fsdp2, or leave them out."
        )
    return train(engine, *args, **kwargs)


Patches().answer(FSDPEngine, "_build_optimizer", _build_optimizer)
Patches().answer(FSDPEngine, "forward_backward_batch", _forward_backward)
Patches().answer(BaseEngine, "train_batch", _train_batch)
