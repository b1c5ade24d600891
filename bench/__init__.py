"""Benchmarks: the peers, the harness that races them, and the suites."""
