"""The tensors of one step: which gradients are regularized, which are kept, and what the arithmetic may touch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradreg_optim.finite_difference import Scalar, ratio

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["FirstGradient", "Part", "Share", "dense", "device_mesh", "owned", "real", "stack_scalars"]


@dataclass
class Share:
    """One parameter group's regularized tensors within one step, and what is known about them so far.

    ``weights`` and ``g1`` are what the arithmetic runs on: real views of complex tensors, local shards of distributed ones.
    ``g1_squared`` is ‖g1‖² after clipping; ``arrived`` and ``sent`` are ⟨θ'_real − θ, g1⟩ and ‖g1‖² on a sample of elements.
    ``written`` is the weight with which g1 + weight·(g2 − g1) has been written over g2 already, if it has been.
    ``absent`` are parameters to regularize that had no gradient; ``samples`` some elements of each g1, where it is not kept.
    """

    strength: float
    parameters: list[Tensor]
    gradients: list[Tensor]
    weights: list[Tensor]
    g1: list[Tensor]
    eps: Scalar = 0.0
    g1_squared: Tensor = field(default_factory=lambda: torch.zeros(()))
    arrived: Tensor = field(default_factory=lambda: torch.zeros(()))
    sent: Tensor = field(default_factory=lambda: torch.zeros(()))
    written: float | None = None
    absent: list[Tensor] = field(default_factory=list)
    samples: list[Tensor] = field(default_factory=list)

    def join(self, parameter: Tensor, gradient: Tensor) -> None:
        """Take in a parameter that only the second pass reaches, with its gradient there: g1 is 0."""
        self.parameters.append(parameter)
        self.gradients.append(torch.zeros_like(gradient))
        self.g1.append(real(self.gradients[-1]))

    def counted(self, tensors: list[Tensor], mesh: DeviceMesh | None) -> list[Tensor]:
        """Those of ``tensors``, laid out like ``g1``, that this rank adds to sums over the ranks of ``mesh``."""
        if mesh is None:
            return tensors
        return [tensor for tensor, parameter in zip(tensors, self.parameters, strict=True) if is_counted(parameter, mesh)]

    @property
    def weight(self) -> Scalar:
        """γ/ε, and 0 if there was no step (ε derived from the radius of a vanishing gradient)."""
        if isinstance(self.eps, Tensor):
            return ratio(self.strength, self.eps)
        return self.strength / self.eps if self.eps else 0.0


@dataclass
class Part:
    """The micro-batches that make the difference, if not all do: their part of the first gradient, before any clip.

    ``factor`` is the number of all micro-batches over that of these.
    """

    factor: float
    gradients: Any


@dataclass
class FirstGradient:
    """Everything taken out of ``.grad`` after the first pass: shares to regularize, and gradients kept as they are.

    ``further`` holds gradients from other points than the last, by their distance from θ in units of the step; ``clip``
    is the factor by which g1 was clipped. ``noise`` is ‖g − g1‖² over this rank's tensors, at a point next to θ.
    """

    shares: list[Share]
    kept: list[tuple[Tensor, Tensor | None]]
    further: dict[float, Any] = field(default_factory=dict)
    clip: Scalar = 1.0
    part: Part | None = None
    noise: Tensor | None = None


def device_mesh(parameters: Iterable[Tensor]) -> DeviceMesh | None:
    """The mesh over which distributed parameters (FSDP2, tensor parallelism) are spread; ``None`` if all are local.

    Raises:
        ValueError: there are several meshes.
    """
    meshes = {parameter.device_mesh for parameter in parameters if hasattr(parameter, "device_mesh")}
    if len(meshes) > 1:
        raise ValueError(
            f"the parameters lie on {len(meshes)} device meshes: norms are summed over one. Shard all parameters that are "
            "regularized over the same mesh, or exclude the others from the optimizer."
        )
    return meshes.pop() if meshes else None


def is_counted(parameter: Tensor, mesh: DeviceMesh) -> bool:
    """Whether this rank adds the parameter's part to sums over ``mesh``: of equal replicas only the first does."""
    coordinate = mesh.get_coordinate()
    placements = getattr(parameter, "placements", None)  # a parameter that is not distributed is a replica everywhere
    replicated = [placements is None or placements[axis].is_replicate() for axis in range(mesh.ndim)]
    return coordinate is not None and all(place == 0 for place, copy in zip(coordinate, replicated, strict=True) if copy)


def stack_scalars(values: list[Any], like: Tensor | None = None) -> Tensor:
    """Python numbers and 0-d tensors as one vector, on the device and in the widest dtype of its tensors or of ``like``."""
    tensors = [value for value in values if isinstance(value, Tensor)] if like is None else [like]
    dtype = max((tensor.dtype for tensor in tensors), key=lambda dtype: dtype.itemsize)
    # An empty share's 0 may lie on the CPU: the device is that of anything elsewhere.
    device = next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), torch.device("cpu"))
    return torch.stack([torch.as_tensor(value, dtype=dtype, device=device) for value in values])


def dense(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The gradient, ready for arithmetic; an error for layouts without it."""
    if gradient.layout != torch.strided:
        raise ValueError(
            f"the gradient of a parameter of shape {tuple(parameter.shape)} has layout {gradient.layout}: only dense "
            "gradients are regularized. Use sparse=False, or leave the parameter out with exclude=."
        )
    return gradient.resolve_conj()


def owned(gradient: Tensor | None) -> Tensor | None:
    """The gradient itself, or a copy if the second pass would overwrite it."""
    if gradient is None or gradient.layout != torch.strided:
        return gradient
    local = local_shard(gradient)
    # A view into a larger buffer, such as a bucket of DistributedDataParallel, which the next backward fills again.
    shared = local.untyped_storage().nbytes() > local.numel() * local.element_size()
    return gradient.clone() if shared else gradient


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def real(tensor: Tensor) -> Tensor:
    """What the arithmetic runs on: shares memory with ``tensor``, and has one element per real number in it."""
    local = local_shard(tensor.detach())
    return torch.view_as_real(local) if local.is_complex() else local
