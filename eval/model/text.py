"""An evaluation's figures as text for people."""

from __future__ import annotations

import re
from typing import Any

from sparsity.common.text import count_text, half_up, percent_text


def figures_text(figures: dict[str, Any]) -> str:
    if "tasks" in figures:
        lines = _tasks(figures)
    elif "word_perplexity" in figures:
        lines = _wikitext(figures)
    else:
        lines = _heldout(figures)
    return "\n".join([*lines, *_zeros(figures)])


def _wikitext(figures: dict[str, Any]) -> list[str]:
    window, stride, bos = figures["window"], figures["stride"], figures["bos_token"]
    rows = [
        (
            "token perplexity",
            half_up(figures["token_perplexity"], 3),
            f"in {figures['num_windows']} disjoint windows of {window} tokens, the rest left out",
        ),
        (
            "",
            half_up(figures["token_perplexity_stride512"], 3),
            f"in windows of {window} tokens that move on by {stride}, every token scored once",
        ),
        (
            "word perplexity",
            half_up(figures["word_perplexity"], 3),
            f"as lm-evaluation-harness's wikitext: {figures['num_pages']} pages as prose, {figures['num_page_words']:,} "
            f"words, each page behind {' '.join(figures['pages_begin_with'])}",
        ),
        ("bits per byte", half_up(figures["bits_per_byte"], 4), f"all tokens, {figures['num_bytes']:,} bytes of text"),
    ]
    width = max(len(value) for _, value, _ in rows)
    return [
        f"{figures['model']} on {figures['data']}, {figures['dtype']}: {figures['num_tokens']:,} tokens with one {bos} in "
        f"front, {figures['num_words']:,} words, {figures['num_lines']:,} lines",
        f"  sha256 {figures['text_sha256']} ({figures['text_bytes']:,} bytes)",
        *(f"  {name:<16}  {value:>{width}}  {how}" for name, value, how in rows),
    ]


def _heldout(figures: dict[str, Any]) -> list[str]:
    return [
        f"{figures['model']} on held-out {figures['data']}: {count_text(figures['num_tokens'])} tokens, "
        f"{count_text(figures['num_bytes'])} bytes, {figures['dtype']}",
        f"  perplexity     {half_up(figures['perplexity'], 3)} a token, in {figures['num_windows']} disjoint windows of "
        f"{figures['window']} tokens",
        f"  bits per byte  {half_up(figures['bits_per_byte'], 4)} (unigram model of the same tokens: "
        f"{half_up(figures['unigram_bits_per_byte'], 4)})",
    ]


def _tasks(figures: dict[str, Any]) -> list[str]:
    lines = [f"{figures['model']} by lm-evaluation-harness, {figures['dtype']}, context {figures['window']}"]
    for task, values in figures["tasks"].items():
        lines += [f"  {task}  {name}  {value:.6g}" for name, value in values.items()]
    return lines


def _zeros(figures: dict[str, Any]) -> list[str]:
    zeros, weights = figures["zero_linear_params"], figures["linear_params"]
    if not weights:
        return ["  no linear layer to count zeros in"]
    counted = f"{zeros:,} of {weights:,} linear weights are zero ({percent_text(zeros / weights)})"
    if not zeros:
        return [f"  dense: {counted}"]
    blocks: dict[str, list[int]] = {}
    for name, count in figures["layer_zeros"].items():
        block = blocks.setdefault(block_of(name), [0, 0])
        block[0] += count
        block[1] += figures["layer_weights"][name]
    width = max(map(len, blocks))
    lines = [
        f"    {name:<{width}}  {some:>13,} of {of:>13,}  {percent_text(some / of)}"
        for name, (some, of) in blocks.items()
    ]
    return [f"  {counted}", *lines]


def block_of(name: str) -> str:
    """Return a weight's numbered layer, model.layers.3 for model.layers.3.mlp.up_proj.weight; its module if there is none."""
    numbered = re.match(r"(.*?\.\d+)\.", name)
    return numbered[1] if numbered else name.removesuffix(".weight")
