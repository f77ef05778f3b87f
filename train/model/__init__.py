"""The model of a run: construction, weights and export."""
