"""Gradient regularization under DeepSpeed. Importing this package needs DeepSpeed.

``optimizer`` has the public class, ``window`` turns accumulation windows into passes, and ``refusals``
rejects engines that are not supported. ``storage`` implements the step's storage. ``gathered`` and ``stage3``
adapt it to DeepSpeed's optimizers, and ``stage0`` adapts the storage of plain optimizers. The last three list
the attributes of DeepSpeed that they rely on in ``PRIVATE``; a test names those that a version lacks.
"""

from gradreg_optim.zero.optimizer import ZeroGradRegOptimizer

__all__ = ["ZeroGradRegOptimizer"]
