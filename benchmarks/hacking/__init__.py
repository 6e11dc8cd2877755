"""Does the penalty keep a policy from hacking its reward? See :mod:`benchmarks.hacking.__main__`."""
