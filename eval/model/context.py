"""The context of a model, the most tokens that it reads at a time. Configs have different names for it."""

from __future__ import annotations

from typing import Any

NAMES = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_seq_length",
    "max_sequence_length",
    "seq_length",
    "seq_len",
    "context_length",
    "model_max_length",
    "max_target_positions",
)
ROBERTAS = frozenset({"camembert", "data2vec-text", "xmod"})
"""Models that count positions as RoBERTa does, although their names do not contain it."""


def context_of(config: Any) -> int | None:
    """Return the longest input that the config names; None if it names none, as for Mamba.

    If the config has several of the names, the smallest value counts, so that a window is never longer than the model's
    training input. A multimodal model has its limit in its text config. `sliding_window` is not a limit, because such layers
    can read longer inputs.
    """
    text = config.get_text_config(decoder=True)
    found = _named(text) or _named(config)
    if not found:
        return None
    context = min(found)
    if "roberta" in text.model_type or text.model_type in ROBERTAS:
        # Positions start after the padding token's id.
        context -= (text.pad_token_id or 0) + 1
    return context


def _named(config: Any) -> list[int]:
    values = [getattr(config, name, None) for name in NAMES]
    # -1 means no limit.
    return [value for value in values if isinstance(value, int) and not isinstance(value, bool) and value > 0]
