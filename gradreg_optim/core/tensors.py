"""Tensors that are compared bit by bit, refused for their layout, or spread over a device mesh (DTensor)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def device_mesh(parameters: Iterable[Tensor]) -> DeviceMesh | None:
    """The one mesh of all distributed parameters (FSDP2, tensor parallelism); ``None`` if all are local."""
    meshes = {parameter.device_mesh for parameter in parameters if hasattr(parameter, "device_mesh")}
    if len(meshes) > 1:
        raise ValueError(
            f"the parameters lie on {len(meshes)} device meshes: norms are summed over one. Shard all "
            "parameters that are regularized over the same mesh, or exclude the others from the optimizer."
        )
    return meshes.pop() if meshes else None


def require_dense(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The gradient, ready for arithmetic; an error for layouts without it."""
    if gradient.layout != torch.strided:
        raise ValueError(
            f"the gradient of a parameter of shape {tuple(parameter.shape)} has layout "
            f"{gradient.layout}: only dense gradients are regularized. Use sparse=False, or leave the "
            "parameter out with exclude=."
        )
    return gradient.resolve_conj()


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def differ(tensor: Tensor, before: Tensor) -> bool:
    """Whether any bit differs: NaN is equal to itself. Waits for the device."""
    if tensor.shape != before.shape or tensor.dtype != before.dtype:
        return True
    now, then = (
        torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
        for t in (tensor.to(before.device), before)
    )
    integer = _INTEGERS[now.element_size()]
    return bool((now.view(integer) != then.view(integer)).any())


def is_counted(parameter: Tensor, mesh: DeviceMesh) -> bool:
    """Whether this rank adds the parameter's part to sums over ``mesh``: only the first replica does."""
    coordinate = mesh.get_coordinate()
    # A parameter that is not distributed is a replica everywhere.
    placements = getattr(parameter, "placements", None)
    replicated = [placements is None or placements[axis].is_replicate() for axis in range(mesh.ndim)]
    return coordinate is not None and all(
        place == 0 for place, copy in zip(coordinate, replicated, strict=True) if copy
    )


def aligned(gradient: Any, parameter: Any) -> Tensor:
    """The gradient, spread like its parameter.

    Tensor parallelism also leaves partial sums, one on each rank, which are added here.
    """
    placements = getattr(parameter, "placements", None)
    if placements is None or getattr(gradient, "placements", placements) == placements:
        return gradient  # type: ignore[no-any-return]
    return gradient.redistribute(placements=placements)  # type: ignore[no-any-return]
