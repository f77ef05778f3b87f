"""Comparison of sparse runs with their dense twins: `python -m eval.pairs runs=runs/SWEEP`."""
