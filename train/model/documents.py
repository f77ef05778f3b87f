"""The check that a model keeps documents apart: every layer mixes tokens by attention alone, and passes on where they end.

Some of transformers' models would take the ends of the documents and ignore them: their attention does not get them, or a
convolution or recurrence runs across. So a copy on the meta device, which computes nothing, is run once and watched.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from train.model.attention import attends_to_all_before
from train.plan.architecture import block_names
from train.plan.config_json import causal_class

WATCHED = "watched_documents"
"""The name in transformers' registry of the attention that the check watches."""


def check_keeps_documents_apart(config: Any) -> None:
    """Refuse a model whose layers would mix the documents of a row under data.attention=document.

    Args:
        config: The model's transformers config.

    Raises:
        ValueError: Some layer mixes them, or it cannot be found out.
    """
    reason = _reason(config)
    if reason:
        raise ValueError(
            f"data.attention=document does not work with model_type={config.model_type}, because {reason}: use "
            "data.attention=causal."
        )


def _reason(config: Any) -> str | None:
    """Return why the documents would not be kept apart; None if they are."""
    told: dict[nn.Module, bool] = {}

    def watch(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *_: Any,
        **given: Any,
    ) -> tuple[Tensor, None]:
        # Attention within documents makes its own mask, so one of the model's own would be lost, such as a window's.
        has_window = given.get("sliding_window") is not None or not _is_windowed(
            config, getattr(module, "layer_idx", 0)
        )
        is_told = given.get("cu_seq_lens_q") is not None and attention_mask is None and has_window
        told[module] = told.get(module, True) and is_told
        return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None

    AttentionInterface.register(WATCHED, watch)
    config = deepcopy(config)
    # Otherwise transformers would look for padding in the tokens.
    config.pad_token_id = None
    _fix_frequencies(config)
    try:
        # transformers multiplies experts on the meta device in bfloat16 only.
        with torch.device("meta"), torch.no_grad():
            model = causal_class(config)._from_config(config, dtype=torch.bfloat16).eval()
            if model.config._attn_implementation != "sdpa":
                return f"its attention is {model.config._attn_implementation} and not SDPA"
            model.set_attn_implementation(WATCHED)
            places, ends = torch.zeros(1, 8, dtype=torch.long), torch.zeros(3, dtype=torch.int32)
            model(input_ids=places, position_ids=places, cu_seq_lens_q=ends, use_cache=False)
    except Exception as error:
        return f"it cannot be checked on the meta device ({' '.join(str(error).split()).rstrip('.')})"
    for name, block in model.named_modules():
        if type(block).__name__ not in block_names(model):
            continue
        inside = list(block.modules())
        if any(isinstance(module, nn.Conv1d) for module in inside):
            return f"{name} mixes tokens by a convolution too"
        if not all(told.get(module, True) for module in inside) or not any(module in told for module in inside):
            return f"{name} does not pass the ends of the documents and its window on to transformers' attention"
    return None if told else "its attention is its own"


def _fix_frequencies(config: Any) -> None:
    """Replace rotary frequencies that grow with the length: the meta device has no positions to compute them from."""
    rope = getattr(config, "rope_parameters", None) or {}
    for one in (rope, *rope.values()):
        if isinstance(one, dict) and one.get("rope_type") == "dynamic":
            one["rope_type"] = "default"


def _is_windowed(config: Any, layer: int) -> bool:
    """Return whether a layer attends only to some of the earlier tokens, by a window or in chunks."""
    kinds = getattr(config, "layer_types", None)
    return kinds[layer] != "full_attention" if kinds else not attends_to_all_before(config)
