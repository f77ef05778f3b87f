"""The smallest keys of all shards: exact, with no gather of weights and no sort.

`search` finds the k-th smallest key over all ranks. It asks a device for passes over the local shards: `passes` says which
there are, `numpy_passes`, `torch_passes` and `triton_passes` implement them, and `device` picks one of the three, once a
selection.
"""

from sparsity.select.search import Threshold, prune_smallest_

__all__ = ["Threshold", "prune_smallest_"]
