"""The group `model`: what is trained."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from conf.schema.checks import check


@dataclass
class ModelConfig:
    """A LLaMA: the names are `transformers.LlamaConfig`'s."""

    name: str = MISSING
    vocab_size: int = 32000
    hidden_size: int = MISSING
    intermediate_size: int = MISSING
    num_hidden_layers: int = MISSING
    num_attention_heads: int = MISSING
    num_key_value_heads: int = MISSING
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    attn_implementation: str | None = None
    match: str | None = None
    """`average` makes this run the dense twin of the configured sparse one: as wide as its average parameter count."""

    def __post_init__(self) -> None:
        check(
            self.match in (None, "average"),
            f"model.match={self.match} is not known: give average for a dense twin, or null.",
        )
        check(
            not {"", ".", ".."} & set(self.name.split("/")),
            f"model.name={self.name} names the run's folder and leaves the runs folder: give a plain name.",
        )
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            value = getattr(self, key)
            check(value > 0, f"model.{key}={value} must be at least 1.")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        check(
            self.hidden_size % heads == 0 and (self.hidden_size // heads) % 2 == 0,
            f"model.hidden_size={self.hidden_size} must be model.num_attention_heads={heads} times an even head width: "
            f"take a multiple of {2 * heads}.",
        )
        check(
            kv_heads > 0 and heads % kv_heads == 0,
            f"model.num_key_value_heads={kv_heads} must divide model.num_attention_heads={heads}.",
        )
