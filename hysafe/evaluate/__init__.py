"""Benchmark suites: models against baselines on the same data, in one run."""
