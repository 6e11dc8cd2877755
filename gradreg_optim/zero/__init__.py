"""Gradient regularization under DeepSpeed. Importing this package needs DeepSpeed.

``optimizer`` is the public class. ``window`` turns accumulation windows into passes. ``refusals`` rejects unsupported
engines. ``storage`` implements the step's storage; ``stage12``, ``stage3`` and ``bf16`` adapt it to DeepSpeed's optimizers,
and ``stage0`` adapts that of plain optimizers. Each of the four lists DeepSpeed's attributes that it relies on in
``PRIVATE``; a test names those that a version lacks.
"""

from __future__ import annotations

from gradreg_optim.versions import warn_outside_range

warn_outside_range("accelerate", "deepspeed")  # before the imports below, which may fail with another version

from gradreg_optim.zero.optimizer import ZeroGradRegOptimizer  # noqa: E402

__all__ = ["ZeroGradRegOptimizer"]
