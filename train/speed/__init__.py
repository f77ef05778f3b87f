"""The speed of a run: measuring, profiling, and making it faster."""
