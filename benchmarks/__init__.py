"""Benchmarks: `make bench`, and the comparison with other engines."""
