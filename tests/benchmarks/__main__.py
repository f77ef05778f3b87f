"""Run all benchmarks one after the other, each compared with its peers: `docs/findings.md` explains their figures.

        python -m tests.benchmarks             minutes, on any machine; also the figures of its GPU, if it has one
    python -m tests.benchmarks --all       the real models' sizes, many ranks, the memory model
    python -m tests.benchmarks --gpu       only those that need a GPU

Each can also be run alone: `python -m tests.benchmarks.selection --help` and so on.
The benchmarks use random tokens and no network. A benchmark whose packages are not installed is skipped and named. If one
fails or misses a goal, the others still run. The last lines say how each went. Exits with 1 unless all that ran reached
their goals.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec


@dataclass(frozen=True)
class Benchmark:
    name: str
    arguments: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    """The packages that it needs in addition to torch, transformers and accelerate."""


CONFIGURED = ("hydra", "omegaconf")
RUNS = (*CONFIGURED, "datasets", "filelock")
QUICK = (
    Benchmark("selection"),
    Benchmark("masking"),
    Benchmark("overhead", needs=RUNS),
    Benchmark("compact"),
    Benchmark("demo", needs=RUNS),
    Benchmark("documents"),
    Benchmark("around", needs=(*RUNS, "wandb")),
)
LONG = (
    Benchmark("selection", ("--large",)),
    Benchmark("scale", ("--figure", "runs/bench/scale.png"), CONFIGURED),
    Benchmark("memory", needs=CONFIGURED),
)
THROUGHPUT, EVENT = Benchmark("throughput", ("--profile",)), Benchmark("event")
ON_GPU = (
    Benchmark("selection", ("--large", "--device", "cuda")),
    Benchmark("masking", ("--device", "cuda")),
    EVENT,
    THROUGHPUT,
    Benchmark("overhead", needs=RUNS),
    Benchmark("memory", needs=CONFIGURED),
)


def chosen(everything: bool, gpu_alone: bool, has_gpu: bool) -> list[Benchmark]:
    """Return the benchmarks to run, each once, in the longest form requested."""
    on_any = [*QUICK, *LONG] if everything else list(QUICK)
    found = ON_GPU if gpu_alone else [*on_any, *((EVENT, THROUGHPUT) if has_gpu else ())]
    return list({benchmark.name: benchmark for benchmark in found}.values())


def run(benchmark: Benchmark) -> str:
    """Run one benchmark and return in a few words how it went."""
    missing = [package for package in benchmark.needs if find_spec(package) is None]
    if missing:
        return f"left out: {', '.join(missing)} not installed"
    started = time.monotonic()
    command = [sys.executable, "-m", f"tests.benchmarks.{benchmark.name}", *benchmark.arguments]
    print(f"--- {' '.join(command[1:])}", flush=True)
    done = subprocess.run(command, check=False)
    return f"{'done' if done.returncode == 0 else 'FAILED OR MISSED A GOAL'} in {time.monotonic() - started:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", dest="everything")
    parser.add_argument("--gpu", action="store_true")
    options = parser.parse_args()
    import torch

    has_gpu = torch.cuda.is_available()
    if options.gpu and not has_gpu:
        parser.error("--gpu needs a GPU, and torch finds none here.")
    benchmarks = chosen(options.everything, options.gpu, has_gpu)
    outcomes = {benchmark.name: run(benchmark) for benchmark in benchmarks}
    for name, outcome in outcomes.items():
        print(f"{name:<12} {outcome}")
    sys.exit(any("FAILED" in outcome for outcome in outcomes.values()))


if __name__ == "__main__":
    main()
