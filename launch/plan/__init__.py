"""The command `python -m launch.plan`: what a run will cost. Nothing here imports torch or transformers."""
