"""Sparse runs beside their dense twins: `python -m eval.pairs runs=runs/SWEEP`."""
