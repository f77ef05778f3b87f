"""A run before it runs: steps, batch, schedule, sizes, memory and time. Nothing here imports torch."""
