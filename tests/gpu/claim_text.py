"""Prepare the text of the claim's runs once, before they start: documents, tokenizer, tokens.

    python -m tests.gpu.claim_text key=value ...

The keys are those of the runs. It prints how many tokens there are, and how often the longest run reads each of them.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from conf.compose import composed
from tests.gpu.runner import FIGURES
from train.data.pipeline import prepare


def main() -> None:
    started = time.monotonic()
    config = composed("train", sys.argv[1:])
    length = config.data.sequence_length or config.model.max_position_embeddings
    data = prepare(config.data, config.tokenizer, config.model.vocab_size, length)
    total = config.trainer.max_steps * config.batch_size * length
    found = {
        "train_tokens": data.train.num_tokens, "train_documents": data.train.num_documents,
        "train_bytes": data.train.num_bytes, "heldout_tokens": data.heldout.num_tokens, "vocab_size": data.vocab_size,
        "epochs": total / data.train.num_tokens, "seconds": time.monotonic() - started,
    }  # fmt: skip
    if FIGURES in os.environ:
        Path(os.environ[FIGURES]).write_text(json.dumps(found))
    size, tokens = data.train.num_bytes / 1e6, data.train.num_tokens / 1e6
    print(f"{size:.1f} MB of text, {tokens:.2f} M tokens, {found['epochs']:.2f} epochs in a run of {total / 1e6:.1f} M")


if __name__ == "__main__":
    main()
