"""Checkpoints: their format, writing and reading, and the choice of the one to resume."""
