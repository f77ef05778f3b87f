"""Measure everything around a step, from the launcher's import to the finished model, against the same done by hand.

    python -m tests.benchmarks.around [--scale 1.0] [--rounds 3]     -> runs/bench/around.json

This covers imports, start-up to the first step, tokenizing, loading, scoring and exporting, with one thread per process.
Text and weights are made here. The two sides of a pair take turns, and the best round of each counts. The launcher's import
is given in processor seconds, so that other work on the machine does not count. Exits with 1 if it takes 0.6 of them or
more, or imports torch.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from tests.benchmarks.common import ONE_THREAD, RESULTS, Comparison, clock, finish, peak_beyond, publish
from tests.benchmarks.startup import small_llama, starting

MOST_IMPORT_SECONDS = 0.6
PROBE = "import sys; import launch.__main__; sys.exit('torch' in sys.modules)"


def processor_seconds(code: str) -> float:
    """Return user and system time of a fresh Python; raise if it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **ONE_THREAD}, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def import_time(rounds: int) -> Comparison:
    ours = min(processor_seconds(PROBE) for _ in range(rounds))
    return Comparison("import of python -m launch", ours, "bare python", processor_seconds("pass"))


def best_in_turns(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int) -> tuple[float, float]:
    pairs = [(clock(ours)[0], clock(theirs)[0]) for _ in range(rounds)]
    return min(pair[0] for pair in pairs), min(pair[1] for pair in pairs)


def tokenizing(scale: float, rounds: int, folder: Path) -> Comparison:
    """Turn documents into ids with separators, against only the tokenizers library."""
    from tokenizers import Tokenizer

    from train.data.pack import _batches, encoder
    from train.data.tokenizer import train_bpe

    generator = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    words = ["".join(generator.choice(letters, size=size)) for size in generator.integers(2, 10, size=5_000)]
    chosen = generator.zipf(1.3, size=int(300_000 * scale)) % len(words)
    documents = [" ".join(words[word] for word in part) for part in np.array_split(chosen, 400)]
    train_bpe(documents, 2_000, folder / "tokenizer.json")
    encode, plain = encoder(str(folder)), Tokenizer.from_file(str(folder / "tokenizer.json"))

    def ours() -> int:
        num_tokens = 0
        for _, texts, _ in _batches(documents, 0.01):
            ids: list[int] = []
            for tokens in encode(texts):
                ids += [*tokens, 0]
            num_tokens += len(np.array(ids, np.uint16))
        return num_tokens

    def theirs() -> int:
        return sum(len(found.ids) for found in plain.encode_batch(documents, add_special_tokens=False))

    seconds, baseline = best_in_turns(ours, theirs, rounds)
    size = sum(len(document) for document in documents)
    return Comparison("tokenizing", seconds, "tokenizers", baseline, {"per_second": size / seconds, "unit": "bytes"})


def loading(scale: float, rounds: int) -> Comparison:
    """Load batches in the sampler's order through a DataLoader, against slices of the array."""
    from torch.utils.data import DataLoader
    from transformers import default_data_collator

    from train.data import Blocks
    from train.data.sampler import PermutationSampler

    length, batch = 2048, 8
    tokens = np.random.default_rng(0).integers(32_000, size=int(2_000 * scale) * length).astype(np.uint16)
    blocks = Blocks(tokens, length)  # type: ignore[arg-type]
    sampler = PermutationSampler(len(blocks), seed=0, batch_size=batch)
    loader = DataLoader(blocks, batch_size=batch, sampler=sampler, collate_fn=default_data_collator, drop_last=True)

    def ours() -> int:
        return sum(found["input_ids"].numel() for found in loader)

    def theirs() -> int:
        rows = tokens.reshape(-1, batch, length)
        return sum(torch.from_numpy(row.astype(np.int64)).numel() for row in rows)

    seconds, baseline = best_in_turns(ours, theirs, rounds)
    details = {"per_second": tokens.size / seconds, "unit": "tokens"}
    return Comparison("loading", seconds, "slices of an array", baseline, details)


def scoring(scale: float, rounds: int) -> Comparison:
    """Compute the held-out likelihood, against forward and cross entropy by hand."""
    from train.distributed import World
    from train.scoring import score_stream

    model, window, batch = small_llama().eval(), 256, 8
    tokens = np.random.default_rng(0).integers(model.config.vocab_size, size=max(4, int(32 * scale)) * window + 1)
    world = World(0, 1, torch.device("cpu"))

    def ours() -> Any:
        return score_stream(model, tokens, window=window, batch_size=batch, world=world)

    @torch.no_grad()
    def theirs() -> float:
        inputs, targets = (torch.from_numpy(part).view(-1, window) for part in (tokens[:-1], tokens[1:]))
        total = 0.0
        for some, wanted in zip(inputs.split(batch), targets.split(batch), strict=True):
            logits = model(input_ids=some, use_cache=False).logits
            total += float(F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum"))
        return total

    seconds, baseline = best_in_turns(ours, theirs, rounds)
    details = {"per_second": len(tokens) / seconds, "unit": "tokens"}
    return Comparison("scoring", seconds, "forward and cross entropy", baseline, details)


def exporting(scale: float, rounds: int, folder: Path) -> Comparison:
    """Write the finished model's folder, against transformers' save_pretrained."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from train.distributed import World
    from train.model.export import export_model

    hidden = max(32, 32 * int(32 * scale**0.5))
    config = LlamaConfig(
        vocab_size=4096, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8,
    )  # fmt: skip
    model, world = LlamaForCausalLM(config), World(0, 1, torch.device("cpu"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))

    def ours() -> None:
        export_model(model, tokenizer, folder / "ours", dtype="float32", max_shard_size="5GB", world=world)

    def theirs() -> None:
        model.save_pretrained(folder / "theirs")
        tokenizer.save_pretrained(folder / "theirs")

    seconds, baseline = best_in_turns(ours, theirs, rounds)
    size = 4 * sum(param.numel() for param in model.parameters())
    details = {"per_second": size / seconds, "unit": "bytes", "extra_bytes": peak_beyond(ours), "model_bytes": size}
    return Comparison("exporting", seconds, "save_pretrained", baseline, details)


def measure(scale: float, rounds: int) -> list[Comparison]:
    """Return all comparisons, made in this process except the imports."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        found = [
            import_time(rounds),
            tokenizing(scale, rounds, Path(name)),
            loading(scale, rounds),
            scoring(scale, rounds),
            exporting(scale, rounds, Path(name)),
            starting(rounds, Path(name)),
        ]
    return found


def missed_goals(comparisons: list[Comparison]) -> list[str]:
    seconds = comparisons[0].seconds
    if seconds <= MOST_IMPORT_SECONDS:
        return []
    return [f"Importing the launcher takes {seconds:.2f} s of a processor, the goal is {MOST_IMPORT_SECONDS}."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the usual amount of data")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "around.json")
    options = parser.parse_args()
    found = measure(options.scale, options.rounds)
    publish(found, options.output, ["per_second", "unit", "extra_bytes", "model_bytes"])
    finish(missed_goals(found))


if __name__ == "__main__":
    main()
