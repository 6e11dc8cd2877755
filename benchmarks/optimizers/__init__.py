"""Which trainers work with which version of TRL? See :mod:`benchmarks.trainers.__main__`."""
