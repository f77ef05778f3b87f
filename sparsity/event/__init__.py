"""One prune event: which weights of a pool are pruned, and the data that their scores read.

`pool` prunes one pool. `nofm`, `blocks` and `rows` do it for patterns and for single neurons; `sparsity.select` finds the
smallest keys for all of them. `needs` lends a score what it reads besides the weights: `gradients`, optimizer states and the
norms of `activations`. `norms` divides the scores of each parameter by their norm, and `collapse` refuses parameters of zeros.
"""

from sparsity.event.pool import prune_pool_

__all__ = ["prune_pool_"]
