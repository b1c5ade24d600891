"""The benchmarks, of ops and of how their cost grows: `pytest bench/ --benchmark-only`."""
