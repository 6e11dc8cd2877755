"""The regularized step under DeepSpeed's ZeRO: everything here needs DeepSpeed.

``optimizer`` has the phases, ``window`` the closure, ``refusals`` what is not supported, ``partitions`` what the phases ask
of DeepSpeed's optimizers, and ``stage12``, ``stage3`` and ``bf16`` where each of those keeps it: they alone touch
DeepSpeed's private attributes, each listed at the top of its file.
"""

from __future__ import annotations

from gradreg_optim.versions import warn_outside_range

warn_outside_range("accelerate", "deepspeed")  # first, lest a name that has moved away be the only word about it

from gradreg_optim.zero.optimizer import ZeroGradRegOptimizer  # noqa: E402

__all__ = ["ZeroGradRegOptimizer"]
