"""The regularized step itself: torch alone, and no knowledge of optimizers, trainers or engines.

Start with :mod:`gradreg_optim.core.regularize`, which is the algorithm.
"""
