"""A finished model's figures: on WikiText by each usual convention, or on a run's held-out split as at its end."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from conf.cli import user_errors
from conf.schema import DataConfig, EvalConfig
from eval.model.causal import PROBE, PROBE_TOKENS, check_reads_no_ahead
from eval.model.context import context_of
from eval.model.harness import check_tasks, run_tasks
from eval.model.load import load_model, model_config, model_folder, vocabulary_size
from eval.model.wikitext import WikiText, as_prose, read_wikitext
from eval.model.windows import rolling_windows, strided_windows
from eval.model.zeros import count_zeros
from train.data import PreparedData, heldout_tokens, load_tokenizer, prepare, unigram_bits_per_byte
from train.data.tokenizer import vocabulary_of
from train.distributed import World
from train.model.attention import attend_within_documents
from train.model.documents import check_keeps_documents_apart
from train.scoring import heldout_documents, perplexity, score_stream, token_nats

USUAL_WINDOW = 2048
LOGITS_AT_A_TIME = 1 << 26
"""256 MiB of float32; on a CPU larger batches are slower."""
MOST_WINDOWS = 8


@dataclass(frozen=True)
class Request:
    """The settings of an evaluation. Rank 0 checks them before any weight is read, and sends them to the other ranks."""

    folder: str
    tokenizer: str
    vocab_size: int
    window: int
    batch_size: int
    probe: list[int]
    """Token ids of a sentence, for the check that the model does not read ahead."""


@dataclass(frozen=True)
class WikiTokens:
    """The tokens of a text, by each convention.

    `tokens` [n] begin with bos. `page_tokens` [m] are the pages one after another, each after the prefix token of
    lm-evaluation-harness, which `page_lengths` include.
    """

    tokens: NDArray[np.int64]
    page_tokens: NDArray[np.int64]
    page_lengths: list[int]
    facts: dict[str, Any]


def evaluate(config: EvalConfig, world: World) -> dict[str, Any]:
    """Return the perplexities and zero counts of a model, the same on every rank.

    If the user made a mistake, all ranks exit, and rank 0 prints one sentence.

    Collective: over all ranks.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    request = world.on_main(checked, config)
    text = world.on_main(read_text, config, request)
    with user_errors(quiet=not world.is_main):
        model = load_model(request.folder, model_config(request.folder), config.dtype, world)
        check_reads_no_ahead(model, config.folder, request.probe, world)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    if text is None:
        with user_errors(quiet=not world.is_main):
            tokenizer = load_tokenizer(request.tokenizer)
            figures = run_tasks(config, model, tokenizer, request.window, request.batch_size)
    elif isinstance(text, WikiTokens):
        figures = wikitext_figures(model, text, request, config.stride or max(1, request.window // 4), world)
    else:
        figures = heldout_figures(model, text, request, world)
    return {
        "model": config.folder,
        "data": "tasks" if config.tasks else config.data.source,
        "dtype": dtype,
        "world_size": world.size,
        **figures,
        **zero_figures(model),
    }


def token_perplexity(folder: str, text: str) -> float:
    """Return a model folder's token perplexity on a text file, by disjoint windows in the stored dtype, in one process.

    Raises:
        ValueError: The folder or the text cannot be read, or the text is shorter than a window.
    """
    config = EvalConfig(folder=folder, data=DataConfig(source="wikitext", path=text))
    transformers_logging.disable_progress_bar()
    request, alone = checked(config), World(0, 1, torch.device("cpu"))
    model = load_model(request.folder, model_config(request.folder), "auto", alone)
    tokens = wiki_tokens(config, request).tokens
    return score_stream(model, tokens, window=request.window, batch_size=request.batch_size, world=alone).perplexity


def checked(config: EvalConfig) -> Request:
    """Check that model, tokenizer and windows fit together.

    Raises:
        ValueError: They do not fit, or one of them cannot be loaded.
    """
    folder = model_folder(config.folder)
    loaded = model_config(folder)
    context, vocab_size = context_of(loaded), vocabulary_size(loaded)
    window = config.window or context
    if window is None:
        raise ValueError(
            f"model={config.folder}, a {loaded.model_type}, has no context length in its config.json: give the length of "
            "the texts it was trained on, such as window=2048."
        )
    if config.window is None and config.data.source == "wikitext" and not config.tasks:
        window = min(window, USUAL_WINDOW)
    if context is not None and window > context:
        raise ValueError(f"window={window} is longer than the model's context of {context} tokens: give at most that.")
    if config.stride is not None and config.stride >= window:
        raise ValueError(f"stride={config.stride} must be below the window of {window} tokens.")
    spec = config.tokenizer or folder
    tokenizer = load_tokenizer(spec)
    size = vocabulary_of(tokenizer)
    if size > vocab_size:
        raise ValueError(
            f"tokenizer={spec} has {size} tokens, more than the {vocab_size} of model={config.folder}: give the tokenizer "
            "that the model was trained with."
        )
    if config.tasks:
        check_tasks(config)
    batch_size = config.batch_size or max(1, min(MOST_WINDOWS, LOGITS_AT_A_TIME // (window * vocab_size)))
    probe = tokenizer(PROBE, add_special_tokens=False)["input_ids"][: min(PROBE_TOKENS, window)]
    return Request(folder, spec, vocab_size, window, batch_size, probe)


def read_text(config: EvalConfig, request: Request) -> WikiTokens | PreparedData | None:
    """Return the text to score, tokenized; None if the evaluation runs tasks, which have their own texts."""
    if config.tasks:
        return None
    if config.data.source == "wikitext":
        return wiki_tokens(config, request)
    return prepare(config.data, request.tokenizer, request.vocab_size, request.window, length_key="window")


def wiki_tokens(config: EvalConfig, request: Request) -> WikiTokens:
    """Read and tokenize WikiText.

    Raises:
        ValueError: The text is shorter than one window.
    """
    tokens = tokenized(read_wikitext(config.data), load_tokenizer(request.tokenizer), request.tokenizer)
    if len(tokens.tokens) < request.window:
        raise ValueError(
            f"data.path={config.data.path} holds {len(tokens.tokens)} tokens, less than one window of {request.window}: "
            "give more text or a smaller window."
        )
    return tokens


def tokenized(text: WikiText, tokenizer: Any, spec: str) -> WikiTokens:
    """Return the tokens of a text; `spec` names the tokenizer in errors.

    Raises:
        ValueError: The tokenizer has neither bos nor eos.
    """
    bos = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if bos is None:
        raise ValueError(f"tokenizer={spec} has no bos or eos token to begin a text with: set its bos_token.")
    # Text that looks like a special token is still text.
    ids = tokenizer(text.text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    pages = [[bos, *tokenizer.encode(as_prose(page), verbose=False)] for page in text.pages]
    return WikiTokens(
        tokens=np.array([bos, *ids], dtype=np.int64),
        page_tokens=np.concatenate([np.array(page, dtype=np.int64) for page in pages]),
        page_lengths=[len(page) for page in pages],
        facts=wiki_facts(text, tokenizer, int(bos), pages[0]),
    )


def wiki_facts(text: WikiText, tokenizer: Any, bos: int, first_page: list[int]) -> dict[str, Any]:
    """Return what was scored: hashes, sizes and counts."""
    scored = text.text.encode()
    return {
        "text_sha256": text.sha256,
        "text_bytes": len(text.source.encode()),
        "num_bytes": len(scored),
        "num_lines": len(text.lines),
        "num_words": text.num_words,
        "num_pages": len(text.pages),
        "num_page_words": text.num_page_words,
        "bos_token": tokenizer.convert_ids_to_tokens(bos),
        "bos_token_id": bos,
        "pages_begin_with": tokenizer.convert_ids_to_tokens(first_page[: 1 + (first_page[1:2] == [bos])]),
    }


def wikitext_figures(model: nn.Module, text: WikiTokens, request: Request, stride: int, world: World) -> dict[str, Any]:
    """Return the perplexities and bits per byte on a text, and the text's sizes. Collective: over all ranks."""
    window = request.window
    how: dict[str, Any] = {"width": window, "batch_size": request.batch_size, "world": world}
    disjoint = score_stream(
        model, text.tokens, window=window, batch_size=request.batch_size, world=world, show_progress=True
    )
    windows = strided_windows(len(text.tokens), window, stride)
    strided = token_nats(model, text.tokens, windows, progress=f"stride {stride}", **how).sum()
    windows = rolling_windows(text.page_lengths, window)
    paged = token_nats(model, text.page_tokens, windows, progress="pages", **how).sum()
    return {
        "token_perplexity": disjoint.perplexity,
        "token_perplexity_stride512": perplexity(strided, len(text.tokens) - 1),
        "word_perplexity": perplexity(paged, text.facts["num_page_words"]),
        "bits_per_byte": disjoint.bits_per_byte(text.facts["num_bytes"]),
        "window": window,
        "stride": stride,
        "num_windows": disjoint.num_windows,
        "num_tokens": len(text.tokens),
        **text.facts,
    }


def heldout_figures(model: nn.Module, data: PreparedData, request: Request, world: World) -> dict[str, Any]:
    """Return the figures on a held-out split that a run reports at its end, and a unigram model's. Collective: all ranks."""
    if data.by_document:
        check_keeps_documents_apart(cast(PreTrainedModel, model).config)
        attend_within_documents(cast(PreTrainedModel, model))
    score = score_stream(
        model,
        heldout_tokens(data),
        documents=heldout_documents(data),
        window=request.window,
        batch_size=request.batch_size,
        world=world,
        show_progress=True,
    )
    return {
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte(data.heldout.num_bytes),
        "unigram_bits_per_byte": world.on_main(unigram_bits_per_byte, data),
        "loss": score.loss,
        "window": request.window,
        "num_windows": score.num_windows,
        "num_tokens": score.num_tokens,
        "num_bytes": data.heldout.num_bytes,
    }


def zero_figures(model: nn.Module) -> dict[str, Any]:
    """Return the counts of weights and zeros in all linear layers and in each. Collective: over all ranks."""
    zeros = count_zeros(model)
    return {
        "linear_params": zeros.num_weights,
        "zero_linear_params": zeros.num_zeros,
        "nonzero_linear_params": zeros.num_weights - zeros.num_zeros,
        "sparsity": zeros.sparsity,
        "dense": zeros.num_zeros == 0,
        "layer_sparsity": {name: layer.sparsity for name, layer in zeros.layers.items()},
        "layer_zeros": {name: layer.num_zeros for name, layer in zeros.layers.items()},
        "layer_weights": {name: layer.num_weights for name, layer in zeros.layers.items()},
    }


def finite(figures: dict[str, Any]) -> dict[str, Any]:
    """Return the figures with None for infinities and NaN, which JSON does not have."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in figures.items()
    }
