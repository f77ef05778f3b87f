"""Attention over packed blocks: causal over the whole block, without a look at the values of its positions."""

from __future__ import annotations

from typing import Any

from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

WHOLE_BLOCKS = "sdpa_whole_blocks"
"""The name under which transformers finds SDPA without a function that makes masks."""


def attend_over_whole_blocks(model: PreTrainedModel) -> None:
    """Have a model that uses SDPA attend causally over each whole row, with neither padding nor documents within it.

    transformers searches the position ids of each micro-batch for documents packed into a row, and the host waits for the
    answer of the GPU (`masking_utils.find_packed_sequence_indices`). It makes no mask for an attention that has none of
    its mask functions: SDPA then gets `is_causal`, as it does after a search that found nothing. The results are the same
    to the last bit. A model with layers that look back only so far needs its masks and keeps them.

    Args:
        model: The model to train. Other implementations than SDPA stay as they are.
    """
    if model.config._attn_implementation == "sdpa" and attends_to_all_before(model.config):
        AttentionInterface.register(WHOLE_BLOCKS, sdpa_attention_forward)
        model.set_attn_implementation(WHOLE_BLOCKS)


def attends_to_all_before(config: Any) -> bool:
    """Tell whether every layer of a model attends to all tokens before, by its config."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return set(kinds) <= {"full_attention"}
    return getattr(config, "sliding_window", None) is None and getattr(config, "attention_chunk_size", None) is None
