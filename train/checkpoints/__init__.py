"""Checkpoints: their format, writing, reading, and which one a run goes on from."""
