"""The authors' parametrisation of a LLaMA: their initial weights, and query weights that include attention's scale.

With folded queries the model keeps its query weights sqrt(head_dim) times smaller than transformers does, and attention
applies no scale. Threshold, optimizer and weight decay then see the smaller weights. Files are in transformers' scale:
export multiplies, reading divides. A factor that is a power of two, as for head_dim 64 or 256, changes no significant
bit; any other costs one rounding per weight.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention

from sparsity.prunable import plain_name

FOLD = "query_fold"
"""The attribute of an attention module that holds how many times smaller its query weights are."""
TRUNCATION = 2.0
"""The number of standard deviations at which the normal distribution is cut off."""
TRUNCATED_STD = 0.87962566103423978
"""The standard deviation of a normal distribution that is cut off at 2, as in JAX's variance_scaling."""
EMBEDDING_STD = 1.0


def fold_queries(model: nn.Module) -> None:
    """Make a LLaMA's attention apply no scale, because its query weights are sqrt(head_dim) times smaller."""
    for module in model.modules():
        if isinstance(module, LlamaAttention):
            module.scaling = 1.0
            setattr(module, FOLD, math.sqrt(module.head_dim))


def query_folds(model: nn.Module) -> dict[str, float]:
    """Return {name of a query weight: how many times smaller it is than in transformers}; empty if none is folded."""
    # A wrapper exposes the attributes of the module inside it, but not in its own `vars`.
    return {
        plain_name(f"{name}.q_proj.weight"): vars(module)[FOLD]
        for name, module in model.named_modules()
        if FOLD in vars(module)
    }


@torch.no_grad()
def fold_drawn_(unit: nn.Module) -> None:
    """Divide freshly drawn query weights in `unit` by their fold, if its attention has folded queries."""
    for module in unit.modules():
        if FOLD in vars(module):
            module.q_proj.weight.div_(vars(module)[FOLD])  # type: ignore[union-attr, operator]


def folded(weight: Tensor, fold: float) -> Tensor:
    """Convert a weight from transformers' scale to the model's, as float32; `fold` is 1 for all but query weights."""
    return weight if fold == 1 else weight.float() / fold


def unfolded(weight: Tensor, fold: float) -> Tensor:
    """Convert a weight from the model's scale to transformers', as float32. Zeros stay zeros, and no others appear."""
    return weight if fold == 1 else weight.float() * fold


@torch.no_grad()
def authors_init(module: nn.Module, owner: PreTrainedModel) -> None:
    """Draw the parameters of one module, without its submodules, as the authors do.

    A linear kernel has the variance 1/fan_in, from a normal distribution cut off at 2 standard deviations. An embedding
    is normal with a standard deviation of 1. The rest is as in transformers.
    """
    if isinstance(module, nn.Linear):
        std = math.sqrt(1 / module.in_features) / TRUNCATED_STD
        nn.init.trunc_normal_(module.weight, 0.0, std, -TRUNCATION * std, TRUNCATION * std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, 0.0, EMBEDDING_STD)
    else:
        owner._init_weights(module)


def transformers_init(module: nn.Module, owner: PreTrainedModel) -> None:
    """Draw the parameters of one module, without its submodules, as transformers' model class does."""
    owner._init_weights(module)


INITS = {"transformers": transformers_init, "authors": authors_init}
"""The values of `model.init`."""
