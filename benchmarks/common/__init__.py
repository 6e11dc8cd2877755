"""What several benchmarks share: the place and stamp of results, tables, arguments."""
