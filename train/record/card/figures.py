"""The card's sections of figures: those of the run, and the table of the runs of its series."""

from __future__ import annotations

from collections.abc import Sequence

from sparsity.common.text import finite_text
from train.record.siblings import Figures, finite, has_sparse_weights
from train.record.table import markdown


def figures_section(own: Figures) -> str:
    """Return a table of the held-out figures, each with the convention by which it was measured."""
    rows = [
        ("Figure", "Value", "Convention"),
        ("---", "---", "---"),
        (
            "Perplexity",
            finite_text(own["perplexity"], 2),
            "exp of the held-out loss: per token of this model's tokenizer, in disjoint windows of "
            f"{own['perplexity_window']} tokens, each scored without the text before it",
        ),
        (
            "Held-out loss",
            finite_text(own["heldout_loss"], 4),
            "nats per token, the mean over all full windows without the first token of each",
        ),
        (
            "Bits per byte",
            finite_text(own["bits_per_byte"], 4),
            f"all {own['heldout_tokens']:,} tokens in the same windows, over the {own['heldout_bytes']:,} bytes of the "
            "text in UTF-8; compares models with different tokenizers",
        ),
        (
            "Bits per byte, unigram",
            finite_text(own["unigram_bits_per_byte"], 4),
            "the same for a model that guesses tokens by their frequency in the training data",
        ),
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return (
        f"All on documents held out from the training data.\n\n{table}\n\nThe perplexities that the paper's authors "
        "publish for their checkpoints are on WikiText-103, by a convention they do not document: do not compare them "
        "with these."
    )


def series_section(own: Figures, siblings: Sequence[Figures]) -> str:
    """Return a table of the run and its siblings, dense ones last, with notes about what can be compared."""
    rows = sorted([own, *siblings], key=lambda row: (not has_sparse_weights(row), row["sparsity"], row["run_name"]))
    lines = [finite(row) | ({"run_name": f"**{row['run_name']}**"} if row is own else {}) for row in rows]
    notes = [
        "Batch size and total tokens are in tokens; total tokens = training steps x batch size.",
        "Average linear parameters are the mean over the steps of the weights not yet pruned.",
        "Final training loss is that of the last 1% of the steps, mean ± standard deviation.",
        "Perplexity is per token of held-out documents; it compares runs of the same data, tokenizer and window.",
    ]
    for row in rows:
        if (row["data"], row["perplexity_window"]) != (own["data"], own["perplexity_window"]):
            notes.append(f"`{row['run_name']}`: scored on {row['data']}, windows of {row['perplexity_window']} tokens.")
    return markdown(lines) + "\n\n" + "\n".join(f"- {note}" for note in notes)
