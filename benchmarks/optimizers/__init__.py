"""Which optimizers work inside the wrapper? See :mod:`benchmarks.optimizers.__main__`."""
