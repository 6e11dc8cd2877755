"""Parameters that are spread over a device mesh (DTensor): which part of them, and of their gradients, this rank counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def is_counted(parameter: Tensor, mesh: DeviceMesh) -> bool:
    """Whether this rank adds the parameter's part to sums over ``mesh``: of equal replicas only the first does."""
    coordinate = mesh.get_coordinate()
    placements = getattr(parameter, "placements", None)  # a parameter that is not distributed is a replica everywhere
    replicated = [placements is None or placements[axis].is_replicate() for axis in range(mesh.ndim)]
    return coordinate is not None and all(place == 0 for place, copy in zip(coordinate, replicated, strict=True) if copy)


def aligned(gradient: Any, parameter: Any) -> Tensor:
    """The gradient, spread like its parameter: tensor parallelism also leaves summands, one a rank, which are added here."""
    placements = getattr(parameter, "placements", None)
    if placements is None or getattr(gradient, "placements", placements) == placements:
        return gradient  # type: ignore[no-any-return]
    return gradient.redistribute(placements=placements)  # type: ignore[no-any-return]
