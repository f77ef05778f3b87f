"""The dense twin of a sparse run: the model whose linear parameters come closest to the run's average N-bar.

N-bar, the mean over the steps of the active linear parameters, predicts the loss of both (arXiv 2501.12486). A LLaMA of
the group `model` gets an MLP of four widths, as in the paper; a model by `model.path` keeps the proportions of its
config.json.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import Any

from conf.schema import ModelConfig
from train.plan.architecture import describe, resolved, transformers_values, unresolved
from train.plan.counts import count_parameters

MLP_RATIO = 4
WIDTHS = {
    "gpt2": ("n_inner",),
    **dict.fromkeys(("llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "gemma3_text"), ("intermediate_size",)),
    **dict.fromkeys(("mixtral", "olmoe"), ("intermediate_size",)),
    "qwen3_moe": ("intermediate_size", "moe_intermediate_size"),
}
"""The fields of config.json that scale with the model's width, by `model_type`; the width of a head scales too."""


@dataclass(frozen=True)
class DenseTwin:
    """The derived model and its difference from N-bar; a positive error means that the model is larger."""

    model: ModelConfig
    target_linear_params: float
    linear_params: int

    @property
    def relative_error(self) -> float:
        """The difference from N-bar as a share of it."""
        return self.linear_params / self.target_linear_params - 1


def dense_twin(model: ModelConfig, average_density: float) -> DenseTwin:
    """Return the twin of a run of `model` at `average_density`; it keeps the numbers of layers, heads and experts.

    The width of a head stays even. Of two widths that are equally close, the narrower one is taken.

    Raises:
        ValueError: The fields that scale with the width are unknown for this architecture.
    """
    target = average_density * count_parameters(model).linear
    unit = 2 * model.num_attention_heads
    if model.path is not None:
        check_has_twin(model)
    most = max(1, model.hidden_size // unit)
    while _linear(model, most * unit) < target:
        most *= 2
    # bisect finds the first width that reaches the target, since counts grow with the width.
    first = 1 + bisect_left(range(1, most + 1), target, key=lambda units: _linear(model, units * unit))
    hidden_sizes = [n * unit for n in (first - 1, first) if n]
    hidden_size = min(hidden_sizes, key=lambda hidden: abs(_linear(model, hidden) - target))
    twin = _at_width(model, hidden_size)
    return DenseTwin(model=twin, target_linear_params=target, linear_params=count_parameters(twin).linear)


def check_has_twin(model: ModelConfig) -> None:
    """Refuse an architecture for which the fields that scale with the width are unknown.

    Raises:
        ValueError: They are unknown; the message names the architectures for which they are known.
    """
    kind = describe(model).kind
    if kind not in WIDTHS:
        raise ValueError(
            f"model.match=average is not defined for model_type={kind}, because it is not known which fields of its "
            f"config.json scale with its width: use it with {', '.join(sorted(WIDTHS))} or the LLaMAs of the group model."
        )


def _at_width(model: ModelConfig, hidden_size: int) -> ModelConfig:
    name = f"{model.name}-{hidden_size}"
    if model.path is None:
        return replace(model, name=name, hidden_size=hidden_size, intermediate_size=MLP_RATIO * hidden_size, match=None)
    fields = scaled_fields(transformers_values(model), hidden_size)
    return resolved(replace(unresolved(model), name=name, overrides={**model.overrides, **fields}, match=None))


def scaled_fields(config: Any, hidden_size: int) -> dict[str, int]:
    """Return the fields of a transformers config that change with its width, with their values at another width.

    Args:
        config: The config at its own width.
        hidden_size: The new width, a multiple of twice the number of heads.
    """
    share = hidden_size / config.hidden_size
    found = {"n_embd" if config.model_type == "gpt2" else "hidden_size": hidden_size}
    for field in WIDTHS[config.model_type]:
        if (width := getattr(config, field)) is not None:
            found[field] = max(1, round(share * width))
    if (head_dim := getattr(config, "head_dim", None)) is not None:
        found["head_dim"] = max(2, 2 * round(share * head_dim / 2))
        if getattr(config, "query_pre_attn_scalar", None) == head_dim:
            # Gemma's attention scale follows the width of its heads.
            found["query_pre_attn_scalar"] = found["head_dim"]
    return found


def _linear(model: ModelConfig, hidden_size: int) -> int:
    return count_parameters(_at_width(model, hidden_size)).linear
