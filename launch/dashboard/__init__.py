"""The panels of `eval.report` as a wandb workspace or report."""
