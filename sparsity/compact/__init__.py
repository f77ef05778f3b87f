"""Compact checkpoints: a sparse model stored as its kept weights and one bit for each weight (docs/format.md).

    import sparsity.compact
    model = AutoModelForCausalLM.from_pretrained("compact-folder")

Importing this registers the format with transformers. `compact_folder` writes a compact folder, and `expand_folder` turns it
back into a plain one. `sparse_linears_` keeps a loaded model's linear layers sparse in memory, as
`CompactWeights(dequantize=False)` does.
"""

from sparsity.compact.contents import METHOD, VERSIONS
from sparsity.compact.folder import Folder, compact_folder, expand_folder
from sparsity.compact.linear import SparseLinear
from sparsity.compact.loading import CompactLoader, CompactWeights
from sparsity.compact.replacement import sparse_linears_

__all__ = [
    "METHOD", "VERSIONS", "CompactLoader", "CompactWeights", "Folder", "SparseLinear", "compact_folder", "expand_folder",
    "sparse_linears_",
]  # fmt: skip
