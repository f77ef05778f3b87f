"""The command `python -m launch.plan`, a run before it runs. Nothing here imports torch or transformers."""
