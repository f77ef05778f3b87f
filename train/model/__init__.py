"""The model of a run: built, given its weights, and exported."""
