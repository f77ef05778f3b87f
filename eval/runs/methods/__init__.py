"""Ways to prune side by side: one line and one point for each method, over its seeds."""
