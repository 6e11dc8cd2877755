"""Does gradient regularization keep a policy from hacking its reward? See :mod:`benchmarks.hacking.__main__`."""
