"""Fused operations, each with its kernel, its reference, its test and its benchmark. None yet."""
