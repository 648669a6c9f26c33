"""Benchmarks of data: indexes, loading, sources."""
