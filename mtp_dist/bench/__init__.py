"""Reproducible benchmarks, behind `mtp-dist bench`."""
