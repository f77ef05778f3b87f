"""The group `model`: the architecture to train."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from omegaconf import MISSING

from conf.schema.checks import check, check_choice

AUTO_NAME = "auto"
BY_CONFIG = 0
"""The placeholder in conf/model/hf.yaml for sizes that `train.plan.architecture.resolved` reads from config.json."""


@dataclass
class ModelConfig:
    """A LLaMA by the names of `transformers.LlamaConfig`; with `path`, any causal language model by its config.json."""

    name: str = MISSING
    """Name used for the run's folder; `auto` takes the last part of `path`."""
    path: str | None = None
    """A transformers folder or hub name whose config.json describes the model; its weights are read only by init_from."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Changes to that config.json, such as {num_hidden_layers: 4}."""
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
    """Standard deviation of the weights that init=transformers draws."""
    init: str = "transformers"
    """Initialization of the weights: `transformers`, or `authors`, as the paper's authors do, with a variance of 1/fan_in."""
    query_scale: str = "standard"
    """`folded` trains query weights that are smaller by 1/sqrt(head_dim), and attention then applies no scale."""
    attn_implementation: str | None = None
    match: str | None = None
    """`average` makes this run the dense twin of the configured sparse run: a dense model with its average size, N-bar."""

    def __post_init__(self) -> None:
        check(
            self.match in (None, "average"),
            f"model.match={self.match} is not known: give average for a dense twin, or null.",
        )
        check_choice("model.init", self.init, ("transformers", "authors"))
        if self.path is not None:
            self._check_by_path()
            return
        check(
            self.name != AUTO_NAME,
            "model=hf takes its architecture from a config.json, but model.path is not set: give a transformers folder or a "
            "hub name, model.path=FOLDER_OR_HUB_NAME.",
        )
        check(
            not self.overrides,
            f"model.overrides={self.overrides} changes a config.json, but model.path names none: set the keys of the "
            "group model, or use model=hf model.path=FOLDER.",
        )
        check_choice("model.query_scale", self.query_scale, ("standard", "folded"))
        check(
            self.init == "transformers" or self.initializer_range == 0.02,
            f"model.initializer_range={self.initializer_range:g} has no effect with model.init={self.init}, which draws "
            "by fan-in: leave it out, or use model.init=transformers.",
        )
        check(
            self.init == "transformers" or not self.tie_word_embeddings,
            f"model.init={self.init} draws embedding and lm_head from different distributions, but "
            "model.tie_word_embeddings=true makes them one tensor: set it to false, or use model.init=transformers.",
        )
        self._check_name()
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

    def _check_name(self) -> None:
        check(
            not {"", ".", ".."} & set(self.name.split("/")),
            f"model.name={self.name} names the run's folder and is outside the runs folder: give a plain name.",
        )

    def _check_by_path(self) -> None:
        assert self.path is not None
        if self.name == AUTO_NAME:
            self.name = PurePath(self.path).name.lower()
        self._check_name()
        check(
            self.init == "transformers" and self.query_scale == "standard",
            f"model.init={self.init} and model.query_scale={self.query_scale} are for the LLaMAs of the group model, but "
            f"model.path={self.path} names another model: use model.init=transformers and model.query_scale=standard.",
        )
