"""Benchmarks, run from a checkout as `python -m bench.bench_NAME`. They are not installed."""
