"""Evaluation of one finished model: loading, checks, perplexity, tasks and zero counts."""
