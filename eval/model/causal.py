"""The check that a model is causal: a perplexity means something only if no token is read before it is predicted."""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES as BASE

from train.distributed import World

PROBE = "The quick brown fox jumps over the lazy dog."
PROBE_TOKENS = 16
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
"""The allowed change, as a share of the largest logit. A causal model differs only by rounding, and only if it has experts."""
COARSE_TOLERANCE = 1.5e-2
"""The same for 16-bit types, whose logits are rounded to 0.4 % of their value."""
CAUSAL_HEADS = ("ForCausalLM", "LMHeadModel", "LMHead")


def check_architecture(folder: str, config: Any) -> None:
    """Check that a config describes a causal language model.

    Raises:
        ValueError: The model has an encoder, has a head that does not continue text, or is a masked language model.
    """
    remedy = "give a causal language model, one that continues text"
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"model={folder} is a {kind}, no causal language model, for it has an encoder: {remedy}.")
    if kind not in CAUSAL:
        raise ValueError(f"model={folder} is a {kind}, no causal language model: {remedy}.")
    # A base model is accepted, because its head may be its embedding. If not, loading reports the head as missing.
    known = {CAUSAL[kind], BASE.get(kind)}
    for name in config.architectures or []:
        if name not in known and not name.endswith(CAUSAL_HEADS):
            raise ValueError(
                f"model={folder} is a {name} by its config.json, which does not continue text: {remedy}, such as a "
                f"{CAUSAL[kind]}."
            )
    if kind in MASKED and hasattr(config, "is_decoder") and not config.is_decoder and kind not in ("xlm", "reformer"):
        raise ValueError(
            f"model={folder} is a {kind} whose config.json does not say is_decoder, so it reads the tokens that it should "
            f"predict: {remedy}."
        )


@torch.no_grad()
def logits_change(model: Any, tokens: list[int], other: int, device: torch.device) -> float:
    """Return how much the earlier logits change if the last token is `other`, as a share of the largest logit.

    Both versions are rows of one batch, so that they use the same kernels.

    Collective: over all ranks if the model is sharded.
    """
    rows = torch.tensor([tokens, [*tokens[:-1], other]], device=device)
    logits = model(input_ids=rows, use_cache=False).logits[:, :-1].float()
    largest = float(logits.abs().max())
    return float((logits[0] - logits[1]).abs().max()) / largest if largest > 0 else 0.0


def check_reads_no_ahead(model: Any, folder: str, tokens: list[int], world: World) -> None:
    """Check that a change of the last token changes no earlier prediction.

    Collective: over all ranks.

    Args:
        model: The loaded model, in eval mode.
        folder: The model's name in the error.
        tokens: Token ids of some text, the same on all ranks. Nothing is checked if they are all equal.
        world: The ranks that hold the model.

    Raises:
        ValueError: The model reads ahead, so its perplexity would be too low.
    """
    last = next((index for index in range(len(tokens) - 1, 0, -1) if tokens[index] != tokens[0]), None)
    if last is None:
        return
    change = logits_change(model, tokens[: last + 1], tokens[0], world.device)
    # Ranks decide together, because one that continued alone would wait for the others forever.
    change = float(world.largest(torch.tensor(change, device=world.device)))
    if change > TOLERANCE.get(next(model.parameters()).dtype, COARSE_TOLERANCE):
        raise ValueError(
            f"model={folder} reads ahead: a change of the last of {last + 1} tokens changes earlier logits by "
            f"{100 * change:.2g} % of the largest: give a causal language model, which predicts each token from those before "
            "it alone."
        )
