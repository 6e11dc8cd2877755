"""What does a regularized step cost? See :mod:`benchmarks.cost.__main__`."""
