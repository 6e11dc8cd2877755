"""Lets verl, which knows only GPUs and NPUs, run on a CPU, by ``VERL_USE_EXTERNAL_MODULES``."""

from __future__ import annotations

from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch
import verl.utils.distributed
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry


class Device(ModuleType):
    """``torch.cpu`` with what verl asks a device besides: it has no memory of its own."""

    is_available = staticmethod(lambda: False)
    mem_get_info = staticmethod(lambda: (0, 0))
    get_device_name = staticmethod(lambda _index=0: "CPU")
    get_rng_state = staticmethod(torch.get_rng_state)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(torch.cpu, name, lambda *_args, **_kwargs: 0)


DEVICE = Device("cpu")
ANSWERS: dict[str, Any] = {
    "device_name": "cpu",
    "vendor_name": "cpu",
    "device_module": DEVICE,
    "is_available": lambda _self: True,
    "current_device": lambda _self: "cpu",
    "communication_backend_name": lambda _self: "gloo",
    "visible_devices_envvar": lambda _self: "CUDA_VISIBLE_DEVICES",
    "ray_resource_name": lambda _self: "CPU",
    "ray_noset_envvars": lambda _self: [],
    "nvtx_range": lambda _self, _message: nullcontext(),
    "get_device_capability": lambda _self, _index=0: (None, None),
}
METHODS = {
    name: ANSWERS.get(name, lambda *_args, **_kwargs: None) for name in PlatformBase.__abstractmethods__
}
PlatformRegistry.register(platform="cpu")(type("Cpu", (PlatformBase,), METHODS))


def _initialize(timeout_second: int = 600) -> None:
    """Name gloo once; verl names it for the CPU and again for the device."""
    torch.distributed.init_process_group("gloo")


verl.utils.distributed.initialize_global_process_group = _initialize
