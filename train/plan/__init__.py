"""The plan of a run: steps, batch, schedule, sizes, memory and time. Importing it does not import torch."""
