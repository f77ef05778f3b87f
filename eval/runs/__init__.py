"""Many runs: the scaling law, pairs of sparse and dense runs, ways to prune, the report page, a sweep's figure."""
