"""Comparison of many runs: the scaling law, pairs of sparse and dense runs, the report page, a sweep's figure."""
