"""The command `python -m launch.plan`: what a run will be, before it runs. Nothing here imports torch or transformers."""
