"""Benchmarks: scripts that measure and check in one run, and the results they wrote."""
