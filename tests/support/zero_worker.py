"""What runs on each rank in the tests of ZeRO, and the float64 reference that it is compared with."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Collection
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import COLLECTIVE_TIMEOUT
from torch import Tensor, nn

FEATURES, CLASSES, ROWS = 5, 3, 4
UNIVERSAL_BATCH = 12


class Net(nn.Module):
    """Parameters of 35, 7, 1, 49, 21 and 3 elements: some are split by every partitioning, one is smaller than a world."""

    def __init__(self, tied: bool = False, frozen: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 7)
        self.scale = nn.Parameter(torch.ones(1))
        self.middle = nn.Linear(7, 7, bias=False)
        self.again = nn.Linear(7, 7, bias=False)
        if tied:
            self.again.weight = self.middle.weight
        self.last = nn.Linear(7, CLASSES)
        if frozen:
            self.again.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x)) * self.scale
        return self.last(torch.tanh(self.again(torch.tanh(self.middle(x)))))


def make_model(**kinds: bool) -> Net:
    torch.manual_seed(0)
    model = Net(**kinds)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model


def make_data(*, steps: int, micro_batches: int, world: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets by step, micro-batch, rank, row."""
    generator = torch.Generator().manual_seed(1)
    shape = (steps, micro_batches, world, ROWS)
    x = torch.randn(*shape, FEATURES, generator=generator)
    return x, torch.randn(*shape, CLASSES, generator=generator)


def make_groups(model: nn.Module, groups: int) -> list[dict[str, Any]]:
    """One group, or two: with the one-element parameter alone, half the ranks own nothing of the second."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if groups == 1:
        return [{"params": [p for _, p in trainable]}]
    return [
        {"params": [p for name, p in trainable if name != "scale"]},
        {
            "params": [p for name, p in trainable if name == "scale"],
            "lr": 0.02,
            "gradreg_strength": 0.2,
            "gradreg_eps": 0.2,
        },
    ]


def make_optimizer(model: nn.Module, groups: int, kind: str = "sgd") -> torch.optim.Optimizer:
    if kind == "cpu_adam":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(make_groups(model, groups), lr=0.01, eps=1e-3, weight_decay=0.01, adamw_mode=True)
    if kind == "adamw":
        return torch.optim.AdamW(make_groups(model, groups), lr=0.01, eps=1e-3)
    return torch.optim.SGD(make_groups(model, groups), lr=0.1, momentum=0.9)


def reference(
    settings: dict[str, Any],
    *,
    steps: int,
    micro_batches: int,
    world: int,
    groups: int = 1,
    kind: str = "sgd",
    max_norm: float = 0.0,
    kinds: dict[str, bool] | None = None,
) -> list[dict[str, Tensor]]:
    """The parameters after each step of the formula, slowly, in float64, in one process on the whole batch."""
    settings = {"strength": 1e-3, "eps": 1e-3, "g1_clip": 10.0, "g2_clip": 10.0, "exclude": ()} | settings
    model = make_model(**(kinds or {})).double()
    optimizer = make_optimizer(model, groups, kind)
    names = {p: name for name, p in model.named_parameters()}
    inputs, targets = make_data(steps=steps, micro_batches=micro_batches, world=world)

    def regularized(group: dict[str, Any]) -> list[Tensor]:
        strength = group.get("gradreg_strength", settings["strength"])
        return [p for p in group["params"] if strength and not any(part in names[p] for part in settings["exclude"])]

    def gradients(step: int) -> dict[Tensor, Tensor]:
        x, y = inputs[step].double().flatten(0, -2), targets[step].double().flatten(0, -2)
        loss = (model(x) - y).square().mean()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        return dict(zip(parameters, torch.autograd.grad(loss, parameters), strict=True))

    def clipped(g: dict[Tensor, Tensor], bound: float | None) -> dict[Tensor, Tensor]:
        chosen = [p for group in optimizer.param_groups for p in regularized(group)]
        norm = torch.stack([g[p].norm() for p in chosen] or [torch.zeros(())]).norm()
        factor = 1.0 if bound is None else min(1.0, bound / (float(norm) + 1e-6))
        return {p: value * factor if p in set(chosen) else value for p, value in g.items()}

    history = []
    for step in range(steps):
        g1 = clipped(gradients(step), settings["g1_clip"])
        start = {p: p.detach().clone() for p in names}

        def gradients_at(distance: float, step: int = step, g1: Any = g1, start: Any = start) -> dict[Tensor, Tensor]:
            with torch.no_grad():
                for group in optimizer.param_groups:
                    for p in regularized(group):
                        p.add_(g1[p], alpha=distance * group.get("gradreg_eps", settings["eps"]))
            found = clipped(gradients(step), settings["g2_clip"])
            with torch.no_grad():
                for p, value in start.items():
                    p.copy_(value)
            return found

        g2 = gradients_at(1.0)
        if settings.get("method") == "central":
            g2 = {p: g1[p] + (g2[p] - before) / 2 for p, before in gradients_at(-1.0).items()}
        for group in optimizer.param_groups:
            chosen = set(regularized(group))
            weight = group.get("gradreg_strength", settings["strength"]) / group.get("gradreg_eps", settings["eps"])
            for p in group["params"]:
                p.grad = g1[p] + weight * (g2[p] - g1[p]) if p in chosen else g1[p]
        if max_norm:
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], max_norm)
        optimizer.step()
        history.append({name: p.detach().clone() for p, name in names.items()})
    return history


def computes_fp16() -> bool:
    """Whether torch runs a layer in fp16 on this CPU, forward and backward."""
    try:
        x = torch.ones(2, 2, dtype=torch.float16, requires_grad=True)
        torch.tanh(nn.functional.linear(x, x)).sum().backward()
    except RuntimeError:
        return False
    return True


def make_config(stage: int, *, micro_batches: int = 1, precision: str = "fp32", **more: Any) -> dict[str, Any]:
    """A DeepSpeed configuration for CPU ranks over gloo; the test is skipped where torch cannot compute in its precision."""
    if precision == "fp16" and not computes_fp16():
        pytest.skip("torch does not compute in fp16 on this CPU")
    zero = {"stage": stage, "stage3_param_persistence_threshold": 10, **more.pop("zero", {})}
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": 0.0,  # DeepSpeed's default is 1.0
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **more,
    }
    if precision == "bf16":
        config["bf16"] = {"enabled": True, **config.pop("bf16", {})}
    if precision == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 8, **config.pop("fp16", {})}
    if precision != "fp32":
        config["communication_data_type"] = "fp32"  # gloo sums no half precision
    return config


@contextmanager
def quiet() -> Any:
    """DeepSpeed without its log, and without warnings that are its own."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def make_engine(
    config: dict[str, Any],
    *,
    groups: int = 1,
    kind: str = "sgd",
    kinds: dict[str, bool] | None = None,
    **more: Any,
) -> Any:
    import deepspeed

    # DeepSpeed's answer (0.18 and 0.19) is whether oneDNN has fp16 kernels for this CPU; where it has none,
    # torch uses its own. Goes when DeepSpeed asks torch.
    # Found now: DeepSpeed asks in the middle of a pass, which notes every backward.
    is_supported = computes_fp16()
    deepspeed.get_accelerator().is_fp16_supported = lambda: is_supported
    with quiet():
        model = make_model(**(kinds or {}))
        optimizer = make_optimizer(model, groups, kind)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, **more)
    return engine


def masters(engine: Any) -> dict[str, Tensor]:
    """The whole fp32 masters, by parameter name."""
    from deepspeed.utils import safe_get_full_fp32_param

    if engine.zero_optimization_stage() == 0:
        names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
        return {names[id(p)]: master.detach().clone() for p, master in zip(*of_stage_0(engine), strict=True)}
    found = {}
    for name, parameter in engine.module.named_parameters():
        value = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
        if value is not None:
            found[name] = value.detach().clone().view(getattr(parameter, "ds_shape", parameter.shape))
    return found


def local_masters(engine: Any) -> list[Tensor]:
    names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
    if engine.zero_optimization_stage() == 0:
        weights, masters = of_stage_0(engine)
        return [] if weights is masters else [master.detach().clone() for master in masters]
    flat = next(getattr(engine.optimizer, name) for name in names if hasattr(engine.optimizer, name))
    return [partition.detach().clone() for partition in flat]


def of_stage_0(engine: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The weights that are trained, and their masters: the weights themselves in fp32."""
    trained = [p for group in engine.optimizer.param_groups for p in group["params"]]
    if isinstance(engine.optimizer, torch.optim.Optimizer):
        return trained, trained
    return [p for group in engine.optimizer.fp16_groups for p in group], trained


def local_weights(engine: Any) -> list[Tensor]:
    """What this rank holds of the weights, which takes no communication."""
    if engine.zero_optimization_stage() == 3:
        return [partition.detach().clone() for partition in engine.optimizer.fp16_partitioned_groups_flat]
    return [parameter.detach().clone() for parameter in engine.module.parameters()]


def same_bits(some: list[Tensor], others: list[Tensor]) -> bool:
    """As bits: the padding of stage 3 is whatever memory held, which may be NaN."""
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(some, others, strict=True))


def weights(engine: Any) -> dict[str, Tensor]:
    """The weights that the model computes with, whole, by parameter name."""
    import deepspeed

    found = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=engine.zero_optimization_stage() == 3):
            found[name] = parameter.detach().clone()
    return found


def window(engine: Any, step: int, inputs: Tensor, targets: Tensor, on_pass: Any = None, worth: float = 1.0) -> Any:
    """A closure over one accumulation window of ``step``; ``on_pass(number)`` is called as each pass begins.

    The loss is multiplied by ``worth``.
    """
    calls: list[int] = []
    rank, dtype = dist.get_rank(), next(engine.module.parameters()).dtype

    def closure() -> Tensor:
        calls.append(1)
        if on_pass is not None:
            on_pass(len(calls))
        loss = None
        for micro_batch in range(inputs.shape[1]):
            x, y = inputs[step, micro_batch, rank].to(dtype), targets[step, micro_batch, rank]
            loss = worth * (engine(x).float() - y).square().mean()
            engine.backward(loss)
            engine.step()
        return loss

    return closure


def train(
    config: dict[str, Any],
    settings: dict[str, Any],
    *,
    steps: int,
    groups: int = 1,
    kind: str = "sgd",
    kinds: dict[str, bool] | None = None,
    one_tensor: bool = False,
    worthless: Collection[int] = (),
) -> dict[str, Any]:
    """Masters after each step, metrics, and whether the masters changed during the detour to θ'.

    The first step has a closure, the second a loop over passes, the third a loop that step() follows, and so
    on. In ``worthless`` steps the loss is multiplied by 0.
    """
    from gradreg_optim import ZeroGradRegOptimizer

    engine = make_engine(config, groups=groups, kind=kind, kinds=kinds)
    if one_tensor:
        zero = engine.optimizer
        for master, weight in zip(zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat, strict=True):
            master.data = weight.data
    optimizer = ZeroGradRegOptimizer(engine, **settings)
    micro_batches = config["gradient_accumulation_steps"]
    is_round_robin = "round_robin_gradients" in config["zero_optimization"]
    inputs, targets = make_data(steps=steps, micro_batches=micro_batches, world=dist.get_world_size())
    seen: dict[str, Any] = {
        "masters": [],
        "values": [],
        "metrics": [],
        "touched": 0,
        "moved": 0,
        "rounded": True,
    }
    for step in range(steps):
        before, at_theta = local_masters(engine), weights(engine)

        def on_pass(number: int, before: Any = before, at_theta: Any = at_theta) -> None:
            seen["touched"] += not same_bits(before, local_masters(engine))
            if number == 2:
                seen["moved"] += any(not torch.equal(at_theta[name], now) for name, now in weights(engine).items())

        with quiet():
            worth = 0.0 if step in worthless else 1.0
            closure = window(engine, step, inputs, targets, on_pass, worth)
            if step % 3:
                for _ in optimizer.passes():
                    closure()
            if step % 3 != 1:
                optimizer.step(None if step % 3 else closure)
        now, after = masters(engine), weights(engine)
        seen["masters"].append(now)
        seen["values"].append(after if after["scale"].dtype == torch.float32 else now)
        rounded = {name: value.to(at_theta[name].dtype) for name, value in now.items()}
        seen["rounded"] &= is_round_robin or all(torch.equal(x, rounded.get(name, x)) for name, x in after.items())
        seen["metrics"].append({name: float(value) for name, value in optimizer.metrics.items()})
    seen["weights"] = weights(engine)
    seen["steps"] = (engine.global_steps, engine.global_samples, engine.micro_steps, engine.skipped_steps)
    engine.destroy()
    return seen


def train_with_weights_elsewhere(config: dict[str, Any], settings: dict[str, Any], *, steps: int) -> dict[str, Any]:
    """:func:`train`, in which θ' is written to weights that are on another device than the masters, as with offload."""
    from elsewhere import Elsewhere

    from gradreg_optim.zero.storage import Partitions

    write, written = Partitions._write, []

    def written_elsewhere(self: Any, *args: Any) -> None:
        writable = self._writable
        self._writable = lambda: [Elsewhere(flat) for flat in writable()]
        try:
            write(self, *args)
        finally:
            del self._writable
        written.append(self)

    Partitions._write = written_elsewhere  # type: ignore[method-assign]
    try:
        return train(config, settings, steps=steps) | {"written": len(written)}
    finally:
        Partitions._write = write  # type: ignore[method-assign]


def progress(engine: Any) -> dict[str, Any]:
    """Everything about an engine that counts steps."""
    timer = engine.tput_timer
    return {
        "steps": (engine.global_steps, engine.global_samples, engine.micro_steps, engine.skipped_steps),
        "timer": (timer.micro_step_count, timer.global_step_count, timer.started),
        "lr": engine.get_lr(),
        "scheduler": engine.lr_scheduler.last_batch_iteration,
    }


def count(config: dict[str, Any], settings: dict[str, Any] | None, *, steps: int) -> dict[str, Any]:
    """The engine's progress after ``steps`` steps: DeepSpeed's own for ``settings=None``."""
    from gradreg_optim import ZeroGradRegOptimizer

    engine = make_engine(config)
    optimizer = None if settings is None else ZeroGradRegOptimizer(engine, **settings)
    micro_batches = config["gradient_accumulation_steps"]
    inputs, targets = make_data(steps=steps, micro_batches=micro_batches, world=dist.get_world_size())
    with quiet():
        for step in range(steps):
            closure = window(engine, step, inputs, targets)
            if optimizer is None:
                closure()
            else:
                optimizer.step(closure)
    found = progress(engine)
    engine.destroy()
    return found


class Interruption(KeyboardInterrupt):
    """Ctrl-C, which is no Exception."""


def give_up(failing: int) -> None:
    """Once rank ``failing`` has come here, the collectives of the others, in which it will be missing, time out at once."""
    from gradreg_optim.zero.gathered import RESCUE_TIMEOUT

    store = dist.distributed_c10d._get_default_store()
    if dist.get_rank() == failing:
        return store.set("failed", "")
    store.wait(["failed"], timedelta(seconds=COLLECTIVE_TIMEOUT))
    for group in dist.distributed_c10d._world.pg_map:
        backend = group._get_backend(torch.device("cpu"))
        if backend.options._timeout < RESCUE_TIMEOUT:
            backend._set_default_timeout(timedelta(seconds=1))


def interrupt(config: dict[str, Any], settings: dict[str, Any], *, on_rank: int | None = None) -> dict[str, Any]:
    """A step whose second pass raises, on every rank or on one; then, if all are in step, the engine's own step."""
    from gradreg_optim import ZeroGradRegOptimizer

    engine = make_engine(config)
    optimizer = ZeroGradRegOptimizer(engine, **settings)
    micro_batches = config["gradient_accumulation_steps"]
    inputs, targets = make_data(steps=2, micro_batches=micro_batches, world=dist.get_world_size())
    counted: list[int] = []

    def loss_hook(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        counted.append(1)
        if len(counted) == min(micro_batches + 2, 2 * micro_batches):  # a micro-batch has run, and the window has not
            if on_rank is not None:
                give_up(on_rank)
            if on_rank in (None, dist.get_rank()):
                raise Interruption
        return output

    before, at_theta, local = local_masters(engine), weights(engine), local_weights(engine)
    hook = engine.module.last.register_forward_hook(loss_hook)
    raised = ""
    with quiet():
        try:
            optimizer.step(window(engine, 0, inputs, targets))
        except BaseException as error:
            raised = type(error).__name__
    hook.remove()
    untouched = same_bits(before, local_masters(engine))
    if on_rank is not None:  # the usual group may be of no use any more
        return {"raised": raised, "untouched": untouched, "whole": same_bits(local, local_weights(engine))}
    whole = weights(engine)
    found = {
        "raised": raised,
        "untouched": untouched,
        "whole": all(torch.equal(at_theta[n], whole[n]) for n in whole),
    }
    with quiet():
        engine.step()  # the first gradient is still there
        found["with_g1"] = masters(engine)
        optimizer.step(window(engine, 1, inputs, targets))
    found["after"] = masters(engine)
    engine.destroy()
    return found


def overflow(config: dict[str, Any], *, in_pass: int) -> dict[str, Any]:
    """Three steps in fp16, the second of which overflows in one of its passes."""
    from gradreg_optim import ZeroGradRegOptimizer

    engine = make_engine(config)
    optimizer = ZeroGradRegOptimizer(engine, strength=0.1, eps=0.1)
    inputs, targets = make_data(steps=3, micro_batches=1, world=dist.get_world_size())
    found: dict[str, Any] = {}
    for step in range(3):
        before, at_theta, scale = local_masters(engine), weights(engine), engine.optimizer.loss_scale
        factor = [1.0]

        def on_pass(number: int, step: int = step, factor: list[float] = factor) -> None:
            factor[0] = 1e6 if step == 1 and number == in_pass else 1.0

        handle = engine.module.last.register_forward_hook(lambda _m, _i, out, factor=factor: out * factor[0])
        with quiet():
            optimizer.step(window(engine, step, inputs, targets, on_pass))
        handle.remove()
        if step == 1:
            found["kept"] = same_bits(before, local_masters(engine))
            found["whole"] = all(torch.equal(at_theta[name], now) for name, now in weights(engine).items())
            found["scale"] = engine.optimizer.loss_scale / scale
    found["moved"] = not same_bits(before, local_masters(engine))
    found |= {
        "engine_skipped": engine.skipped_steps,
        "penalties_skipped": float(optimizer.metrics["skipped"]),
    }
    engine.destroy()
    return found


def resume(config: dict[str, Any], settings: dict[str, Any], folder: str) -> dict[str, Any]:
    """Four steps in one go, and four with a checkpoint of the engine loaded into a new one half-way."""
    from gradreg_optim import ZeroGradRegOptimizer

    inputs, targets = make_data(steps=4, micro_batches=1, world=dist.get_world_size())
    engine = make_engine(config)
    optimizer = ZeroGradRegOptimizer(engine, **settings)
    with quiet():
        for step in range(4):
            if step == 2:
                engine.save_checkpoint(folder)
            optimizer.step(window(engine, step, inputs, targets))
        straight = masters(engine)
        engine.destroy()
        engine = make_engine(config)
        optimizer = ZeroGradRegOptimizer(engine, **settings)
        engine.load_checkpoint(folder)
        found = {"step": optimizer.step_count, "steps": engine.global_steps}
        for step in range(2, 4):
            optimizer.step(window(engine, step, inputs, targets))
        resumed = masters(engine)
    found["same"] = all(torch.equal(straight[name], resumed[name]) for name in straight)
    engine.destroy()
    return found


def universal(config: dict[str, Any], settings: dict[str, Any], folder: str, *, begin: int, end: int) -> dict[str, Any]:
    """Steps ``begin`` to ``end`` on one whole batch, which any number of ranks may share; a checkpoint at the end."""
    from gradreg_optim import ZeroGradRegOptimizer

    world = dist.get_world_size()
    config = {**config, "train_micro_batch_size_per_gpu": UNIVERSAL_BATCH // world}
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4, 1, UNIVERSAL_BATCH, FEATURES, generator=generator).unflatten(2, (world, -1))
    y = torch.randn(4, 1, UNIVERSAL_BATCH, CLASSES, generator=generator).unflatten(2, (world, -1))
    engine = make_engine(
        config | {"checkpoint": {"load_universal": begin > 0}}, kind="adamw"
    )  # the tool knows no other state
    optimizer = ZeroGradRegOptimizer(engine, **settings)
    with quiet():
        if begin:
            engine.load_checkpoint(folder, tag="universal")
        found: dict[str, Any] = {"step": optimizer.step_count}
        for step in range(begin, end):
            optimizer.step(window(engine, step, x, y))
        found["masters"] = masters(engine)
        engine.save_checkpoint(folder, tag="saved")
    engine.destroy()
    return found


def missing_attributes(module: str, stage: int, attributes: str, config: dict[str, Any]) -> list[str]:
    """The private attributes that ``module`` lists as ``attributes`` and that DeepSpeed's optimizer lacks."""
    names = getattr(importlib.import_module(f"gradreg_optim.zero.{module}"), attributes)
    engine = make_engine(make_config(stage, **config))
    missing = [name for name in names if not hasattr(engine.optimizer, name)]
    engine.destroy()
    return missing


def refused(changes: dict[str, Any], settings: dict[str, Any] | None = None) -> str:
    """What the construction says about an engine of which some answers were changed."""
    from gradreg_optim import ZeroGradRegOptimizer

    engine = make_engine(make_config(changes.pop("stage", 2), **changes.pop("config", {})))
    for name, value in changes.items():
        setattr(engine, name, (lambda value=value: value) if callable(getattr(engine, name, len)) else value)
    try:
        ZeroGradRegOptimizer(engine, **(settings or {}))
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def misuse(kind: str) -> str:
    """What ``step`` says to a closure that is not one accumulation window."""
    from gradreg_optim import ZeroGradRegOptimizer

    engine = make_engine(make_config(2, micro_batches=2))
    optimizer = ZeroGradRegOptimizer(engine)
    inputs, targets = make_data(steps=2, micro_batches=2, world=dist.get_world_size())
    if kind == "step twice":
        try:
            with quiet():
                for _ in optimizer.passes():
                    window(engine, 0, inputs, targets)()
                optimizer.step()
                optimizer.step()
        except RuntimeError as error:
            return f"{type(error).__name__}: {error}"
        finally:
            engine.destroy()
    closures = {
        "half a window": window(engine, 0, inputs[:, :1], targets[:, :1]),
        "two windows": lambda: [window(engine, step, inputs, targets)() for step in range(2)][-1],
        "no closure": None,
    }
    try:
        with quiet():
            optimizer.step(closures[kind])
    except (RuntimeError, AssertionError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        engine.destroy()
    return "nothing"
