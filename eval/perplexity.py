"""Held-out figures of a finished model, by the same scoring as at the end of its training."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from conf.schema import EvalConfig
from eval.zeros import count_zeros
from train.data import heldout_tokens, prepare, unigram_bits_per_byte
from train.distributed import World
from train.scoring import score_stream


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Perplexity and bits per byte on the held-out split of `config.data`, and the zero counts of the linear layers."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    # Weights from safetensors alone, and no code of the folder: a model may come from anywhere.
    model = AutoModelForCausalLM.from_pretrained(config.folder, trust_remote_code=False, use_safetensors=True)
    model = model.eval().to(device)
    window = config.window or model.config.max_position_embeddings
    data = prepare(config.data, config.tokenizer or config.folder, model.config.vocab_size, window)
    score = score_stream(
        model,
        heldout_tokens(data),
        window=window,
        batch_size=config.batch_size,
        world=World(rank=0, size=1, device=torch.device(device)),
        show_progress=True,
    )
    zeros = count_zeros(model)
    return {
        "model": config.folder,
        "data": config.data.source,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte(data.heldout.num_bytes),
        "unigram_bits_per_byte": unigram_bits_per_byte(data),
        "loss": score.loss,
        "window": window,
        "num_windows": score.num_windows,
        "num_tokens": score.num_tokens,
        "num_bytes": data.heldout.num_bytes,
        "linear_params": zeros.num_weights,
        "zero_linear_params": zeros.num_zeros,
        "nonzero_linear_params": zeros.num_weights - zeros.num_zeros,
        "sparsity": zeros.sparsity,
        "layer_sparsity": {name: layer.sparsity for name, layer in zeros.layers.items()},
    }
