"""Checkpoints: their format, writing, reading, and the choice of the one to resume."""
