"""The steps of `python -m tests.gpu bench`: how fast the project is on this device, and what takes the time."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tests.gpu.check import MORE_CORES
from tests.gpu.runner import Step

PYTHON = sys.executable
TINY = (
    "--hidden", "32", "--layers", "1", "--heads", "2", "--vocabulary", "64", "--length", "16", "--batch", "2", "--steps", "1",
    "--backend", "eager",
)  # fmt: skip
FREE_MEMORY = {**MORE_CORES, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
"""With this setting, memory that one variant leaves in fragments can be used by the next."""
VARIANT_SECONDS, REHEARSED_SECONDS = 80, 120
"""The seconds of the budget for the variants of the 1B, without the start of their process."""
DECODE_SECONDS = 65


def benchmark(name: str, output: Path, *arguments: str) -> tuple[str, ...]:
    return (PYTHON, "-m", f"tests.benchmarks.{name}", *arguments, "--output", str(output / f"{name}.json"))


def steps(work: Path, output: Path, rehearse: bool, more: Sequence[str] = ()) -> list[Step]:
    """Return the steps, each alone on the device: event, decoding, variants, a profile of the best, a run, masking."""
    tiny = ("--rehearse",) if rehearse else ()
    seconds = REHEARSED_SECONDS if rehearse else VARIANT_SECONDS
    throughput = (
        "--together", "--seconds", str(seconds), "--trace", str(output / "trace.json.gz"),
        *(TINY if rehearse else ("--steps", "8")),
    )  # fmt: skip
    masked = ("--numel", "20003" if rehearse else "200000000", "--rounds", "1" if rehearse else "5")
    found = [Step("device", (PYTHON, "-m", "tests.gpu.device", *tiny), expected_s=12, timeout_s=60, alone=True)]
    event = benchmark("event", output, *tiny)
    found.append(Step("1B: event and selection", event, expected_s=45, timeout_s=80, alone=True))
    decode = benchmark("decode", output, "--seconds", "60", *tiny)
    found += [
        Step(
            "decoding with sparse weights", decode, expected_s=DECODE_SECONDS, timeout_s=300 if rehearse else 90, alone=True,
            says="a token of the 1B",
        ),
        Step(
            "1B: tokens a second by variant", benchmark("throughput", output, *throughput), expected_s=seconds + 15,
            timeout_s=seconds + 40, alone=True, environment=FREE_MEMORY, says="profile of",
        ),
    ]  # fmt: skip
    dense = (
        PYTHON, "-m", "tests.gpu.large_run", "--work", str(work / "large"), "--dense", "--steps", "12" if rehearse else "40",
        "--batch", "8", "--profile", *tiny,
    )  # fmt: skip
    masking = benchmark("masking", output, *masked, "--device", "cpu" if rehearse else "cuda")
    found += [
        Step("1B: the run path, dense", dense, expected_s=55, timeout_s=110, alone=True, environment=MORE_CORES),
        Step("masking", masking, expected_s=25, timeout_s=60, alone=True, says="masking gradients"),
    ]
    return found
