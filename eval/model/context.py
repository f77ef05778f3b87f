"""The most tokens that a model was made to read at a time, by whatever name its config has for them."""

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
"""Models with RoBERTa's positions, beside those with its name."""


def context_of(config: Any) -> int | None:
    """Return the longest input that the config names; None if it names none, as for Mamba.

    Of several names the smallest counts: a window is never longer than the model's training input. A model of text and
    something else has its limit in its text config. `sliding_window` is no limit: such layers read longer inputs too.
    """
    text = config.get_text_config(decoder=True)
    found = _named(text) or _named(config)
    if not found:
        return None
    context = min(found)
    if "roberta" in text.model_type or text.model_type in ROBERTAS:
        # Positions start after the padding's.
        context -= (text.pad_token_id or 0) + 1
    return context


def _named(config: Any) -> list[int]:
    values = [getattr(config, name, None) for name in NAMES]
    # -1 means no limit.
    return [value for value in values if isinstance(value, int) and not isinstance(value, bool) and value > 0]
