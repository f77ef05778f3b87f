"""The panels of `eval.report` as a workspace or a report of wandb."""
