"""Compare the compact checkpoint with other ways to store a sparse model's file: to copy it, or to gzip or zstd it.

    python -m tests.benchmarks.compact [--numel 100000000] [--sparsity 0.8] [--rounds 3]   -> runs/bench/compact.json

Seconds are the processor time of one thread, its system calls included, so that neither the disk nor other work counts.
Files are in the page cache and are synced. The best round of each method counts, and the tensors that it gives back are
compared with the original ones. Rates are megabytes of dense data per second. Extra memory (the peak of the process beyond
what it used before) is measured in a separate process with exact malloc settings. Exits with 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sparsity.compact.files import check_file, compact_file, expand_file
from tests.benchmarks.common import (
    EXACT_MEMORY,
    RESULTS,
    Comparison,
    finish,
    in_process,
    peak_beyond,
    publish,
)

MODULE = "tests.benchmarks.compact"
LEAST_RATE = 300.0
MOST_BITS = 4.25
COPY, GZIP, ZSTD, SHA = "safetensors load and save", "gzip -1", "zstd -3", "sha256 of the same file"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def write_dense(path: Path, numel: int, sparsity: float, dtype: str, num_tensors: int = 8) -> int:
    """Write `numel` weights in tensors of equal size, `sparsity` of them zero; return the bytes of a tensor."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for index in range(num_tensors):
        weight = torch.randn(numel // num_tensors, generator=generator)
        weight[torch.rand(weight.shape, generator=generator) < sparsity] = 0
        tensors[f"w{index}"] = weight.to(DTYPES[dtype]).view(-1, 100)
    save_file(tensors, path)
    return tensors["w0"].nbytes


def copy(source: Path, target: Path) -> None:
    save_file(load_file(source), target)
    sync(target)


def compress_gzip(source: Path, target: Path) -> None:
    with open(source, "rb") as file, gzip.open(target, "wb", compresslevel=1) as out:
        shutil.copyfileobj(file, out, 1 << 20)
    sync(target)


def expand_gzip(source: Path, target: Path) -> None:
    with gzip.open(source, "rb") as file, open(target, "wb") as out:
        shutil.copyfileobj(file, out, 1 << 20)
    sync(target)


def run_zstd(source: Path, target: Path, *options: str) -> None:
    subprocess.run(["zstd", "-q", "-f", *options, str(source), "-o", str(target)], check=True)
    sync(target)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def core_seconds(body: Callable[[], object]) -> float:
    """Return the processor time of a call and of the processes that it runs."""

    def spent() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in used)

    before = spent()
    body()
    return spent() - before


def methods(folder: Path) -> dict[tuple[str, str], Callable[[], object]]:
    """Return the calls to time, by task and method; each method reads the file that it wrote."""
    plain, target = folder / "plain", folder / "target"
    found: dict[tuple[str, str], Callable[[], object]] = {
        ("compact", "ours"): partial(compact_file, plain, folder / "ours"),
        ("compact", COPY): partial(copy, plain, target),
        ("compact", GZIP): partial(compress_gzip, plain, folder / GZIP),
        ("expand", "ours"): partial(expand_file, folder / "ours", target),
        ("expand", COPY): partial(copy, plain, target),
        ("expand", GZIP): partial(expand_gzip, folder / GZIP, target),
        ("check", "ours"): partial(check_file, folder / "ours"),
        ("check", SHA): partial(sha256, folder / "ours"),
    }
    if shutil.which("zstd"):
        found["compact", ZSTD] = partial(run_zstd, plain, folder / ZSTD, "-3", "--single-thread")
        found["expand", ZSTD] = partial(run_zstd, folder / ZSTD, target, "-d")
    return found


def time_methods(folder: str, numel: int, sparsity: float, rounds: int, dtype: str) -> dict[str, Any]:
    """Return the best seconds of each method, and the sizes of their files."""
    torch.set_num_threads(1)
    place = Path(folder)
    write_dense(place / "plain", numel, sparsity, dtype)
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        for key, method in methods(place).items():
            seconds.setdefault(key, []).append(core_seconds(method))
    expand_file(place / "ours", place / "target")
    expected, found = load_file(place / "plain"), load_file(place / "target")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), "other tensors come back"
    sizes = {name: (place / file).stat().st_size for name, file in _files(place).items()}
    return {"seconds": [[*key, min(taken)] for key, taken in seconds.items()], "sizes": sizes}


def _files(place: Path) -> dict[str, str]:
    found = {"ours": "ours", COPY: "plain", GZIP: GZIP, ZSTD: ZSTD, SHA: "ours"}
    return {name: file for name, file in found.items() if (place / file).exists()}


def extra_bytes(folder: str, numel: int, sparsity: float, dtype: str, num_tensors: int = 8) -> dict[str, int | None]:
    """Return by how much the peaks of writing and reading exceed the memory used before, and the size of a tensor."""
    torch.set_num_threads(1)
    place = Path(folder)
    found: dict[str, int | None] = {}
    for size in (100 * num_tensors, numel):
        found["tensor"] = write_dense(place / "plain", size, sparsity, dtype, num_tensors)
        found["compact"] = peak_beyond(lambda: compact_file(place / "plain", place / "ours"))
        found["expand"] = peak_beyond(lambda: expand_file(place / "ours", place / "target"))
    return found


def measure(numel: int, sparsity: float, rounds: int) -> list[Comparison]:
    found = []
    for dtype in DTYPES:
        with tempfile.TemporaryDirectory() as folder:
            timed = in_process(MODULE, "time_methods", folder, numel, sparsity, rounds, dtype)
        with tempfile.TemporaryDirectory() as folder:
            extra = in_process(MODULE, "extra_bytes", folder, numel, sparsity, dtype, **EXACT_MEMORY)
        seconds = {(action, name): taken for action, name, taken in timed["seconds"]}
        dense_bytes = timed["sizes"][COPY]
        for (action, name), taken in seconds.items():
            if name == "ours":
                continue
            ours = seconds[action, "ours"]
            details = {
                "numel": numel, "sparsity": sparsity, "dtype": dtype, "threads": 1,
                "megabytes_per_second": dense_bytes / 1e6 / ours,
                "bits_per_weight": 8 * timed["sizes"]["ours"] / numel,
                "baseline_bits_per_weight": 8 * timed["sizes"][name] / numel,
                "extra_bytes": extra.get(action), "tensor_bytes": extra["tensor"],
            }  # fmt: skip
            found.append(Comparison(f"{action}, {dtype}", ours, name, taken, details))
    return found


def missed_goals(comparisons: list[Comparison]) -> list[str]:
    """Return a sentence for each goal that was not reached."""
    missed = {}
    for found in comparisons:
        rate, bits = found.details["megabytes_per_second"], found.details["bits_per_weight"]
        extra, tensor = found.details["extra_bytes"], found.details["tensor_bytes"]
        if rate < LEAST_RATE:
            missed[found.name, "rate"] = f"{found.name} ran at {rate:.0f} MB/s, the goal is {LEAST_RATE:.0f}."
        if found.details["dtype"] == "bfloat16" and bits > MOST_BITS:
            missed[found.name, "bits"] = f"{found.name} took {bits:.3f} bits a weight, the goal is {MOST_BITS}."
        if extra is not None and extra > tensor:
            missed[found.name, "memory"] = f"{found.name} needed {extra} bytes, a tensor has {tensor}."
    return list(missed.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=100_000_000)
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "compact.json")
    options = parser.parse_args()
    found = measure(options.numel, options.sparsity, options.rounds)
    publish(found, options.output, ["megabytes_per_second", "bits_per_weight", "baseline_bits_per_weight"])
    finish(missed_goals(found))


if __name__ == "__main__":
    main()
