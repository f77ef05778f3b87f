"""Attention over packed blocks that never inspects the values of position ids: over the whole block or by document."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

WHOLE_BLOCKS = "sdpa_whole_blocks"
"""The name in transformers' registry of SDPA without a mask function."""
DOCUMENTS = "sdpa_documents"
"""The name in transformers' registry of attention within documents, which makes its own masks."""
MOST_FLASH_WIDTH = 256
"""The largest head size of the flash kernels."""
FLASH_WIDTH_STEP = 8


def attend_over_whole_blocks(model: PreTrainedModel) -> None:
    """Make a model that uses SDPA attend causally over each whole row, without regard to padding or documents.

    By default transformers searches the position ids of each micro-batch for documents packed into a row, and the host
    waits for the GPU's answer (`masking_utils.find_packed_sequence_indices`). It skips the search for an attention that
    has no mask function: SDPA then gets `is_causal`, as it does after a search that found nothing. The results are the
    same to the last bit. A model with sliding-window layers needs its masks and keeps them.

    Args:
        model: The model to train. It is left unchanged if it uses another implementation of attention than SDPA.
    """
    if model.config._attn_implementation == "sdpa" and attends_to_all_before(model.config):
        AttentionInterface.register(WHOLE_BLOCKS, sdpa_attention_forward)
        model.set_attn_implementation(WHOLE_BLOCKS)


def attends_to_all_before(config: Any) -> bool:
    """Return whether every layer of a model attends to all earlier tokens, according to its config."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return set(kinds) <= {"full_attention"}
    return getattr(config, "sliding_window", None) is None and getattr(config, "attention_chunk_size", None) is None


def attend_within_documents(model: PreTrainedModel) -> None:
    """Make a model that uses SDPA attend causally within the documents of its rows.

    The model then takes `cu_seq_lens_q` of `train.data.collate` in addition to its inputs. Without it, the model attends
    over whole rows.

    Args:
        model: The model to train or to score.

    Raises:
        ValueError: The model uses another implementation of attention.
    """
    used = model.config._attn_implementation
    if used not in ("sdpa", WHOLE_BLOCKS, DOCUMENTS):
        raise ValueError(
            f"data.attention=document chooses attention itself and model.attn_implementation={used} would be ignored: leave "
            "model.attn_implementation null."
        )
    AttentionInterface.register(DOCUMENTS, attend_by_document)
    model.set_attn_implementation(DOCUMENTS)


def attend_by_document(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend causally within documents, by the flash kernel for variable lengths or else by SDPA and a mask.

    Args:
        module: The attention layer; `query` to `scaling` are as in transformers' own functions, [batch, heads,
            length, width].
        cu_seq_lens_q: The offsets at which documents begin and end, counted over all rows in sequence, int32; None to
            attend over whole rows.
        sliding_window: The number of tokens to which a token attends, itself included; None for all earlier tokens of
            its document.

    Returns:
        The attended values [batch, length, heads, width], and None for the attention weights.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, sliding_window=sliding_window, softcap=softcap,
            **kwargs,
        )  # fmt: skip
    narrow, width = _narrow_dtype(query, value), query.shape[-1]
    fits_flash = width <= MOST_FLASH_WIDTH and not dropout and softcap is None
    if query.is_cuda and narrow is not None and fits_flash:
        return _flash_by_document(query, key, value, cu_seq_lens_q, scaling, sliding_window, narrow), None
    mask = document_mask(cu_seq_lens_q, query.shape[0], query.shape[2], sliding_window)
    return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, softcap=softcap)


def document_mask(ends: Tensor, num_rows: int, length: int, sliding_window: int | None = None) -> Tensor:
    """Return a bool mask [rows, 1, length, length]: whether a token (third dimension) attends to another one (fourth).

    Args:
        ends: The offsets at which documents begin and end, as `cu_seq_lens_q`.
        num_rows: The number of rows.
        length: The number of tokens in a row.
        sliding_window: As in `attend_by_document`.
    """
    places = torch.arange(num_rows * length, device=ends.device, dtype=torch.int32)
    # Unused entries repeat the last offset, which is past all tokens.
    documents = torch.searchsorted(ends, places, right=True).view(num_rows, length)
    distance = places[:length, None] - places[None, :length]
    near = distance >= 0
    if sliding_window is not None:
        near = near & (distance < sliding_window)
    return ((documents[:, :, None] == documents[:, None, :]) & near)[:, None]


def _narrow_dtype(query: Tensor, value: Tensor) -> torch.dtype | None:
    """Return the 16-bit dtype in which attention is computed, or None if the dtype is wider."""
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    return dtype if dtype in (torch.bfloat16, torch.float16) else None


def _flash_by_document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends: Tensor,
    scaling: float | None,
    sliding_window: int | None,
    dtype: torch.dtype,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    num_rows, num_heads, length, width = query.shape
    groups = num_heads // key.shape[1]
    # The kernel takes widths that are multiples of 8; added columns of zeros change no product.
    missing = -width % FLASH_WIDTH_STEP
    scaling = width**-0.5 if scaling is None else scaling
    flat_query, flat_key, flat_value = (
        F.pad(states.to(dtype), (0, missing)).transpose(1, 2).reshape(num_rows * length, num_heads, width + missing)
        for states in (query, repeat_kv(key, groups), repeat_kv(value, groups))
    )
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    found: Any = varlen_attn(
        flat_query, flat_key, flat_value, ends, ends, length, length, scale=scaling, window_size=window
    )
    attended: Tensor = found.view(num_rows, length, num_heads, width + missing)[..., :width]
    return attended
