"""What is lost with fewer than two gradients in a step? See :mod:`benchmarks.below_two.__main__`."""
