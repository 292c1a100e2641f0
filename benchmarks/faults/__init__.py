"""Whole jobs killed, cut off and damaged; what is lost is counted: ``python -m benchmarks.faults``."""
