"""Measurements of speed and memory: `python -m benchmarks.suite --suite all`."""
