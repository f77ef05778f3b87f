"""The dense twin of a sparse run: the LLaMA whose linear parameters come closest to the run's average N-bar.

N-bar, the mean over the steps of the active linear parameters, predicts the loss of both (arXiv 2501.12486).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from conf.schema import ModelConfig
from train.plan.counts import count_parameters

MLP_RATIO = 4


@dataclass(frozen=True)
class DenseTwin:
    """The derived LLaMA, and how far its linear parameters are off N-bar: a positive error is a larger model."""

    model: ModelConfig
    target_linear_params: float
    linear_params: int

    @property
    def relative_error(self) -> float:
        return self.linear_params / self.target_linear_params - 1


def dense_twin(model: ModelConfig, average_density: float) -> DenseTwin:
    """The twin of a run of `model` at `average_density`: head counts and layers kept, head_dim even, MLP 4 x the width.

    Among two widths equally far off, the narrower.
    """
    target = average_density * count_parameters(model).linear
    unit = 2 * model.num_attention_heads
    num_units = 1
    while _linear(model, num_units * unit) < target:
        num_units += 1
    hidden_sizes = [n * unit for n in (num_units - 1, num_units) if n]
    hidden_size = min(hidden_sizes, key=lambda hidden: abs(_linear(model, hidden) - target))
    twin = _at_width(model, hidden_size)
    return DenseTwin(model=twin, target_linear_params=target, linear_params=count_parameters(twin).linear)


def _at_width(model: ModelConfig, hidden_size: int) -> ModelConfig:
    name = f"{model.name}-{hidden_size}"
    return replace(model, name=name, hidden_size=hidden_size, intermediate_size=MLP_RATIO * hidden_size, match=None)


def _linear(model: ModelConfig, hidden_size: int) -> int:
    return count_parameters(_at_width(model, hidden_size)).linear
