"""The benchmarks, one file per operation: `pytest bench/ --benchmark-only`."""
