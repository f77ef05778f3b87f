"""Measure what `data.attention=document` costs in a training step on a CPU: such a step takes turns with a causal one.

    python -m tests.benchmarks.documents [--pairs 30] [--length 256 --length 1024]     -> runs/bench/documents.json

Both train the same small LLaMA in float32, in one process and with the attention of runs, on blocks of packed documents that
have 5 to 2,500 tokens, 520 on average. A step by document is divided by the mean of the causal steps before and after it, and
the median of these ratios is the cost. On a GPU, `tests.benchmarks.throughput` has a variant by document.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.common import RESULTS, Comparison, beside, clock, publish
from tests.benchmarks.own_steps import Training
from tests.benchmarks.throughput_variants import Variant, Workload

WORK = Workload(hidden=256, layers=4, heads=4, vocabulary=4096, batch=2)
LENGTHS = (256, 1024)
WARM_UP = 3


def measure(work: Workload, pairs: int) -> Comparison:
    """Train both ways in turns, and return their comparison."""
    causal, by_document = (
        Training(work, Variant("", attention=attention, precision="float32", compiled=False), "cpu")
        for attention in ("sdpa", "document")
    )
    batches, laps = work.batches("cpu"), list[tuple[float, float]]()
    for number in range(WARM_UP + pairs + 1):
        tokens = batches[number % len(batches)]
        laps.append((clock(lambda: causal.step(tokens))[0], clock(lambda: by_document.step(tokens))[0]))  # noqa: B023
    timed = laps[WARM_UP:]
    return compare([lap for _, lap in timed[:-1]], [lap for lap, _ in timed], work)


def compare(by_document: Sequence[float], causal: Sequence[float], work: Workload) -> Comparison:
    """Return the row of the laps; each step by document is between two causal ones."""
    ratios = beside(by_document, causal)
    cost, step = statistics.median(ratios), statistics.median(causal)
    details: dict[str, Any] = {"cost": cost, "pairs": len(ratios), "hidden": work.hidden, "layers": work.layers}
    details |= {
        "length": work.length,
        "batch": work.batch,
        "tokens_per_second": work.batch * work.length / (step * cost),
    }
    return Comparison(f"by document, blocks of {work.length}", step * cost, "causal", step, details)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--length", type=int, action="append", help="tokens in a block; may be given several times")
    parser.add_argument("--output", type=Path, default=RESULTS / "documents.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = [measure(replace(WORK, length=length), options.pairs) for length in options.length or LENGTHS]
    publish(found, options.output, ["cost", "pairs", "tokens_per_second"])


if __name__ == "__main__":
    main()
