"""Small causal language models as transformers folders, with weights so large that their predictions differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, set_seed

from train.data.tokenizer import train_bpe, wrap_bpe

VOCABULARY = 300
CONTEXT = 32
TEXT = 'the town has a long history , with 1 @,@ 200 people ( or so ) who said " no " . its mayor \'s house'


def wiki_source(num_pages: int = 3, words_per_page: int = 120) -> str:
    """Return pages in WikiText's format, each with different words."""
    vocabulary, pages = TEXT.split(), []
    for page in range(num_pages):
        words = [vocabulary[(7 * page + 5 * word + word * word) % len(vocabulary)] for word in range(words_per_page)]
        half = len(words) // 2
        parts = [" ".join(words[:half]), " = = History = = ", " ".join(words[half:])]
        pages.append("\n \n ".join([f" \n = Page {page} = ", *parts]) + " \n")
    return "".join(pages)


def llama(**changes: Any) -> LlamaForCausalLM:
    set_seed(0)
    shape = {
        "vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT,
        "initializer_range": 0.3,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**(shape | changes))).eval()


def gpt2(**changes: Any) -> GPT2LMHeadModel:
    set_seed(0)
    shape = {
        "vocab_size": VOCABULARY, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT,
        "initializer_range": 0.3,
    }  # fmt: skip
    return GPT2LMHeadModel(GPT2Config(**(shape | changes))).eval()


def saved(model: Any, folder: Path, **options: Any) -> Path:
    """Write the model and a byte-level tokenizer to a folder, and a text for them, `text.raw`, beside it."""
    model.save_pretrained(folder, **options)
    train_bpe([wiki_source()], VOCABULARY, folder / "bpe.json")
    wrap_bpe(folder / "bpe.json", CONTEXT).save_pretrained(folder)
    (folder / "bpe.json").unlink()
    (folder.parent / "text.raw").write_text(wiki_source())
    return folder


@torch.no_grad()
def prune(model: Any, share: float) -> int:
    """Zero the first rows of each linear layer, and return the number of zeros."""
    from sparsity.prunable import own_linear_weights

    total = 0
    for weight in own_linear_weights(model).values():
        rows = round(share * len(weight))
        weight[:rows] = 0
        total += weight[:rows].numel()
    return total
