"""The benchmark of `model.generate`: what it measures is what it says."""

from __future__ import annotations

import torch

from sparsity.compact import SparseLinear
from tests.benchmarks.decode_generate import MANY_TOKENS, llama, seconds_of_a_token, sparse
from tests.benchmarks.event import TINY


@torch.no_grad()
def test_a_sparse_copy_decodes_by_its_own_weights_even_if_the_model_was_compiled_before():
    dense = llama(TINY, 8, "cpu")
    _, tokens = seconds_of_a_token(dense, "static", "cpu")
    assert any(tokens)
    copied = sparse(dense)
    for layer in copied.modules():
        if isinstance(layer, SparseLinear):
            layer.values.zero_()
    for cache in ("static", "dynamic"):
        _, tokens = seconds_of_a_token(copied, cache, "cpu")
        assert tokens == [0] * MANY_TOKENS
