"""How accurate is the penalty in fp32, fp16 and bf16? See :mod:`benchmarks.precision.__main__`."""
