"""The tiny run that many tests use: its text and its overrides. This needs only the standard library."""

from __future__ import annotations

import json
from pathlib import Path

STEPS = 24


def write_text(path: Path) -> Path:
    """Write a small language whose next word depends on the last two: easy to learn, but hard for a unigram model."""
    words = ["red", "green", "blue", "black", "white", "grey", "pink"]
    with open(path, "w") as file:
        for number in range(600):
            a, b, line = number % 7, number % 5, []
            for _ in range(60):
                a, b = b, (2 * a + b + 1) % 7
                line.append(words[b])
            file.write(json.dumps({"text": f"Story {number}: " + " ".join(line)}) + "\n")
    return path


def tiny(folder: Path, *overrides: str) -> list[str]:
    return [
        "data=text", f"data.path={folder}/text.jsonl", "data.heldout_share=0.1", f"data.cache_dir={folder}/cache",
        "model.vocab_size=300", "model.hidden_size=32", "model.intermediate_size=64", "model.num_hidden_layers=2",
        "model.num_attention_heads=2", "model.num_key_value_heads=2", "model.max_position_embeddings=32",
        f"runs_dir={folder}/runs", "run_name=tiny", "batch_size=8", f"trainer.max_steps={STEPS}",
        "trainer.per_device_train_batch_size=2", "trainer.logging_steps=1", "optim.learning_rate=0.01", *overrides,
    ]  # fmt: skip
