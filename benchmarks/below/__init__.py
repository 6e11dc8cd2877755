"""The studies of benchmarks/below_two.py, and its report."""
