"""The check that a model may be given a perplexity: it has to predict each token without having read it."""

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
"""Share of the largest logit. In a causal model only rounding changes anything, and only if experts are chosen."""
COARSE_TOLERANCE = 1.5e-2
"""The same for 16-bit types, whose logits are rounded to 0.4 % of themselves."""
CAUSAL_HEADS = ("ForCausalLM", "LMHeadModel", "LMHead")


def check_architecture(folder: str, config: Any) -> None:
    """Raise if the folder's config is not of a causal language model.

    Raises:
        ValueError: It has an encoder, another head than one that continues text, or is a masked language model.
    """
    remedy = "give a causal language model, one that continues text"
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"model={folder} is a {kind}, no causal language model, for it has an encoder: {remedy}.")
    if kind not in CAUSAL:
        raise ValueError(f"model={folder} is a {kind}, no causal language model: {remedy}.")
    # A folder of the base model is one whose head is the embedding; any other head's weights would be missing.
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
    """Return how much the logits before the last token change if that token is `other`, as a share of the largest.

    One forward pass of a batch of two, so that both rows use the same kernels. Collective if the model is sharded.
    """
    rows = torch.tensor([tokens, [*tokens[:-1], other]], device=device)
    logits = model(input_ids=rows, use_cache=False).logits[:, :-1].float()
    largest = float(logits.abs().max())
    return float((logits[0] - logits[1]).abs().max()) / largest if largest > 0 else 0.0


def check_reads_no_ahead(model: Any, folder: str, tokens: list[int], world: World) -> None:
    """Raise if a change of the last token changes an earlier prediction. Collective.

    Args:
        model: The loaded model, in eval mode.
        folder: Its name in the error.
        tokens: Ids of some text that the model can read, the same on all ranks; less than two different ones say nothing.
        world: The ranks that the model is on.

    Raises:
        ValueError: The model reads ahead, so that a perplexity would be too good to be true.
    """
    last = next((index for index in range(len(tokens) - 1, 0, -1) if tokens[index] != tokens[0]), None)
    if last is None:
        return
    change = logits_change(model, tokens[: last + 1], tokens[0], world.device)
    # Ranks decide together: one that continued alone would wait for the others for ever.
    change = float(world.largest(torch.tensor(change, device=world.device)))
    if change > TOLERANCE.get(next(model.parameters()).dtype, COARSE_TOLERANCE):
        raise ValueError(
            f"model={folder} reads ahead: a change of the last of {last + 1} tokens changes earlier logits by "
            f"{100 * change:.2g} % of the largest: give a causal language model, which predicts each token from those before "
            "it alone."
        )
