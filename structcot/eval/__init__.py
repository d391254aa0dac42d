"""Benchmarks: problems -> requests -> outputs -> grades -> statistics -> report."""
