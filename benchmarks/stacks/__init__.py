"""Which training stacks work? See :mod:`benchmarks.stacks.__main__`."""
