"""What a run will be, before it runs: `python -m launch.plan`. Nothing here imports torch or transformers."""
