"""Compact checkpoints: a sparse model in the bytes of its kept weights and one bit a weight (docs/compact.md).

    import sparsity.compact
    model = AutoModelForCausalLM.from_pretrained("compact-folder")

Importing this makes transformers know the format. `compact_folder` writes it, `expand_folder` a plain folder from it.
`sparse_linears_` keeps a loaded model's linear layers sparse in memory, as `CompactWeights(dequantize=False)` does.
"""

from sparsity.compact.contents import METHOD, VERSIONS
from sparsity.compact.folder import Folder, compact_folder, expand_folder
from sparsity.compact.linear import SparseLinear, sparse_linears_
from sparsity.compact.loading import CompactLoader, CompactWeights

__all__ = [
    "METHOD", "VERSIONS", "CompactLoader", "CompactWeights", "Folder", "SparseLinear", "compact_folder", "expand_folder",
    "sparse_linears_",
]  # fmt: skip
