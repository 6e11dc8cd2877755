"""The optimizers that people wrap: the package of each, how it is built on a model, and how near two runs of it can be."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from problems import DENSE_OPTIMIZERS
from torch import nn
from torch.optim import Optimizer

FP32 = 5e-6
"""The distance of two runs in float32 whose gradients differ by rounding: weights of 0.1 that move by as much."""


@dataclass(frozen=True)
class Kind:
    """One optimizer: ``path`` of its class, how it is built, and ``tolerance`` for the weights after two steps."""

    path: str
    build: Callable[[Any, nn.Module], Optimizer]
    tolerance: float = FP32

    @property
    def module(self) -> str:
        return self.path.split(".")[0]

    def __call__(self, model: nn.Module) -> Optimizer:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # imports of other packages
            module, _, name = self.path.rpartition(".")
            return self.build(getattr(importlib.import_module(module), name), model)


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.ndim == 2]


def others(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.ndim != 2]


def on_all(**kwargs: Any) -> Callable[[Any, nn.Module], Optimizer]:
    return lambda cls, model: cls(model.parameters(), **{"lr": 1e-2, **kwargs})


def on_matrices(**kwargs: Any) -> Callable[[Any, nn.Module], Optimizer]:
    return lambda cls, model: cls(matrices(model), **{"lr": 1e-2, **kwargs})


def in_two_groups(key: dict[str, Any], rest: dict[str, Any], **kwargs: Any) -> Callable[[Any, nn.Module], Optimizer]:
    """Matrices in a group with the keys of ``key``, the other parameters in one with those of ``rest``."""
    return lambda cls, model: cls([{"params": matrices(model), **key}, {"params": others(model), **rest}], **kwargs)


LOW_RANK = {"rank": 4, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
APOLLO = LOW_RANK | {"proj": "random", "scale_type": "channel"}
MUON = in_two_groups({"use_muon": True}, {"use_muon": False}, lr=1e-2)

OTHERS = {
    "transformers.optimization.Adafactor": on_all(scale_parameter=False, relative_step=False),
    "bitsandbytes.optim.AdamW8bit": on_all(min_8bit_size=1),
    "bitsandbytes.optim.PagedAdamW8bit": on_all(min_8bit_size=1),
    "bitsandbytes.optim.Lion8bit": on_all(min_8bit_size=1),
    "torchao.optim.AdamW8bit": on_all(),
    "torchao.optim.AdamW4bit": on_all(),
    "torchao.optim.AdamWFp8": on_all(),
    "torchao.optim._AdamW": on_all(),
    "schedulefree.AdamWScheduleFree": on_all(),
    "schedulefree.RAdamScheduleFree": on_all(),
    "schedulefree.SGDScheduleFree": on_all(),
    "prodigyopt.Prodigy": on_all(lr=1.0),
    "lion_pytorch.Lion": on_all(),
    "galore_torch.GaLoreAdamW": in_two_groups(LOW_RANK, {}, lr=1e-2),
    "apollo_torch.APOLLOAdamW": in_two_groups(APOLLO, {}, lr=1e-2),
    "muon.SingleDeviceMuon": on_matrices(),
    "muon.SingleDeviceMuonWithAuxAdam": in_two_groups({"use_muon": True}, {"use_muon": False}),
    "heavyball.AdamW": on_all(),
    "heavyball.SOAP": on_all(),
    "heavyball.Muon": on_all(),
    "heavyball.PSGDKron": on_all(),
    "heavyball.SFAdamW": on_all(),
    "optimi.AdamW": on_all(triton=False),
    "optimi.StableAdamW": on_all(triton=False),
    "optimi.Adan": on_all(triton=False),
    "grokadamw.GrokAdamW": on_all(),
    "came_pytorch.CAME": on_all(),
    "adam_mini.Adam_mini": lambda cls, model: cls(model.named_parameters(), lr=1e-2, verbose=False),
}

# Those of pytorch_optimizer that are not built from parameters and a learning rate alone.
OF_PYTORCH_OPTIMIZER = {
    **dict.fromkeys(["AdaGO", "AdaMuon", "Muon", "MuonClip", "NorMuon"], MUON),
    "AdamMini": lambda cls, model: cls(model, lr=1e-2),
    "Ranger21": on_all(num_iterations=10),
    "SpectralSphere": on_matrices(),
}
NOT_WRAPPED = {
    "AdaHessian": "its step differentiates the gradient again, which the combined one does not allow",
    "SophiaH": "its step differentiates the gradient again, which the combined one does not allow",
    "DeMo": "it exchanges gradients between ranks by itself",
    "DistributedMuon": "it exchanges updates between ranks by itself",
    "AdaLOMO": "it steps in the backward",
    "LOMO": "it steps in the backward",
    "AliG": "its step needs a closure of its own",
    "BSAM": "its step needs a closure of its own",
    "LBFGS": "its step needs a closure of its own",
}

AMPLIFIES = {
    # Orthogonalize in bfloat16.
    *("muon.SingleDeviceMuon", "pytorch_optimizer.SCION", "pytorch_optimizer.SpectralSphere"),
    # Eigenvectors, directions.
    *(f"pytorch_optimizer.{name}" for name in ("Alice", "Conda", "DASH", "SOAP", "SPlus")),
    *("heavyball.SOAP", "pytorch_optimizer.Kate", "pytorch_optimizer.LoRARite"),
}
"""Optimizers whose steps on two gradients that differ by rounding differ by far more.

Their weights are compared only with those of the bare optimizer on the very same gradient.
"""


def of_pytorch_optimizer() -> list[Kind]:
    """All that the installed version has; one that stands for them where it is not installed."""
    if importlib.util.find_spec("pytorch_optimizer") is None:
        return [Kind("pytorch_optimizer.SOAP", on_all())]
    import pytorch_optimizer

    classes = {pytorch_optimizer.load_optimizer(name).__name__ for name in pytorch_optimizer.get_supported_optimizers()}
    own = sorted(name for name in classes - set(NOT_WRAPPED) if hasattr(pytorch_optimizer, name))
    return [Kind(f"pytorch_optimizer.{name}", OF_PYTORCH_OPTIMIZER.get(name, on_all())) for name in own]


def of_torch(cls: type[Optimizer]) -> Kind:
    return Kind(f"torch.optim.{cls.__name__}", on_matrices() if cls.__name__ == "Muon" else on_all())


REPRESENTATIVE = (
    "AdaMuon",  # groups told apart by a key
    "AdamMini",  # built on the module
    "Lion",
    "Ranger21",
    "SOAP",  # eigenvectors in its state
    "ScheduleFreeAdamW",  # moves the weights between steps
    "Shampoo",
    "SpectralSphere",
)
"""Those of pytorch_optimizer's hundred that every run of the tests tries."""


def is_common(kind: Kind) -> bool:
    """Whether the tests try it in each run: all that is installed but most of pytorch_optimizer."""
    if importlib.util.find_spec(kind.module) is None:
        return False
    return kind.module != "pytorch_optimizer" or kind.path.split(".")[1] in REPRESENTATIVE


KINDS = [
    *map(of_torch, DENSE_OPTIMIZERS),
    *(Kind(path, build) for path, build in OTHERS.items()),
    *of_pytorch_optimizer(),
]
