"""Exact selection of the smallest keys of all shards, without gathering weights and without sorting.

`search` finds the k-th smallest key over all ranks with passes over the local shards. `passes` defines them; `numpy_passes`,
`torch_passes` and `triton_passes` implement them; `device` chooses one of the three for each selection.
"""

from sparsity.select.search import Threshold, prune_smallest_

__all__ = ["Threshold", "prune_smallest_"]
