"""Measure global magnitude pruning: our selection and masks against torch's own. The masks are checked to be exact.

    python -m tests.benchmarks.selection [--numel 50000000] [--sparsity 0.8] [--rounds 3] [--large] [--device cuda]
        [--dtype bfloat16]    -> runs/bench/selection.json, with --large also of 200 M and 1.14 B weights

The methods of one process take turns, and the best round of each counts; a slow method has one round. With a single thread
on a CPU, the seconds are processor time, so that other work on the machine does not count. Extra memory (the peak beyond
weights and masks) is measured in a separate process, because the malloc settings that make it exact cost time. A peer that
would need more memory than this machine has, judged by its use at the first size, is left out and named. `one read pass` is
the lower bound: the time to read the weights once, at the bandwidth of a copy measured in the same rounds. `compiled passes`
are the two passes of a selection with a known threshold, by torch.compile on a CPU: they show what compiled kernels would
gain. A `prune event` is everything that the callback does in one: selection, zeros in weights and both moments, counts. If
there is a GPU, every measurement is also made there. Exits with 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from tests.benchmarks.common import (
    EXACT_MEMORY,
    RESULTS,
    Comparison,
    can_compile,
    devices,
    finish,
    in_process,
    publish,
)
from tests.benchmarks.peers import (
    BASELINES,
    COMPILED,
    FLOOR,
    REFERENCE,
)
from tests.benchmarks.selection_times import MODULE, OURS, time_ranks
from tests.distributed import run_ranks

LEAST_SPEEDUP = 50.0
MOST_EXTRA_SHARE = 0.01
LEAST_MEASURED_NUMEL = 20_000_000
"""The smallest size for which the goals hold: below it, fixed buffers and calls are most of the cost."""
MOST_PASSES_ON_GPU = 3.0
MOST_EVENT_SECONDS_ON_GPU = 0.010
PEERS = {"float32": [*BASELINES, COMPILED], "bfloat16": [*BASELINES]}
GATHERED = ("kthvalue", "sort")
EVENT_BYTES = 13
"""The bytes of a weight with its mask and two moments."""
RANK_BYTES = 7
"""The most bytes per weight on a rank, which holds all weights, the masks to compare with, and its shards' masks."""
LARGE = (200_000_000, 1_139_277_824)
FREE_SHARE = 0.9
"""The share of the free memory that a measurement may take."""


def compare_one_process(
    numel: int, sparsity: float, rounds: int, device: str, dtype: str, threads: int, baselines: Sequence[str]
) -> list[Comparison]:
    """Compare our method with the baselines and the lower bound, in separate processes."""
    peers = [name for name in baselines if name in BASELINES]
    seconds = in_process(MODULE, "time_one_process", numel, sparsity, rounds, device, dtype, threads, baselines)
    extra = in_process(MODULE, "extra_bytes", numel, sparsity, device, dtype, peers, **EXACT_MEMORY)
    share = None if extra[OURS] is None else extra[OURS] / (numel * getattr(torch, dtype).itemsize)
    details = where(numel, sparsity, device, dtype, threads) | {"extra_bytes": extra[OURS], "extra_share": share}
    return [
        Comparison(
            "selection, one process",
            seconds[OURS],
            name,
            seconds[name],
            {**details, "baseline_extra_bytes": extra.get(name)},
        )
        for name in [*baselines, FLOOR]
    ]


def compare_event(numel: int, sparsity: float, rounds: int, device: str) -> Comparison:
    event = in_process(MODULE, "time_event", numel, sparsity, rounds, device)
    return Comparison("prune event", event[OURS], FLOOR, event[FLOOR], where(numel, sparsity, device))


def compare_ranks(
    numel: int,
    sparsity: float,
    rounds: int,
    dtype: str,
    num_ranks: int,
    baselines: Sequence[str],
    reference: float | None = None,
) -> list[Comparison]:
    """Compare our method on row shards with gathering, and with `reference`: torch's processor seconds in one process."""
    ranks = run_ranks(time_ranks, num_ranks, numel, sparsity, rounds, dtype, list(baselines), timeout_s=900)[0]
    peers = {**{f"gather + {name}": ranks[name] for name in baselines}, FLOOR: ranks[FLOOR]}
    if reference is not None:
        peers = {f"{REFERENCE}, one process": reference, **peers}
    details = where(numel, sparsity, "cpu", dtype, ranks=num_ranks)
    name = f"selection, {num_ranks} ranks"
    return [Comparison(name, ranks[OURS], peer, seconds, details) for peer, seconds in peers.items()]


def where(
    numel: int, sparsity: float, device: str, dtype: str = "float32", threads: int = 1, ranks: int = 1
) -> dict[str, Any]:
    """Return the conditions of a measurement, which every row names."""
    details = {"numel": numel, "sparsity": sparsity, "threads": threads, "dtype": dtype, "device": device}
    return {**details, "ranks": ranks}


def that_fit(needs: dict[str, float], numel: int, device: str) -> list[str]:
    """Return the peers for which there is enough memory, given their bytes per weight; print the others."""
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
    for name, bytes_per_weight in needs.items():
        if numel * bytes_per_weight > FREE_SHARE * free:
            print(
                f"{name} of {numel:,} weights on {device} is left out: it takes {bytes_per_weight:.0f} bytes a weight."
            )
    return [name for name, bytes_per_weight in needs.items() if numel * bytes_per_weight <= FREE_SHARE * free]


def measure(
    sizes: Sequence[int],
    sparsity: float,
    rounds: int,
    on: Sequence[str] = ("cpu",),
    dtypes: Sequence[str] = tuple(PEERS),
    num_ranks: int = 2,
) -> list[Comparison]:
    """Return all comparisons on the devices `on`, with sizes in rising order; ranks use a CPU, and events float32."""
    found: list[Comparison] = []
    for device in on:
        for dtype in dtypes:
            needs = {name: 0.0 for name in PEERS[dtype] if name != COMPILED or can_compile(device)}
            for numel in sizes:
                fitting = that_fit(needs, numel, device)
                found += said(compare_one_process(numel, sparsity, rounds, device, dtype, 1, fitting))
                needs |= bytes_per_weight(found[-len(fitting) - 1 :])
        for numel in sizes if "float32" in dtypes else ():
            if that_fit({"prune event": EVENT_BYTES}, numel, device):
                found += said([compare_event(numel, sparsity, rounds, device)])
    for dtype in dtypes if "cpu" in on else ():
        alone = [row for row in found if (row.details["device"], row.details["dtype"]) == ("cpu", dtype)]
        gathering = {name: num_ranks * (RANK_BYTES + 4 + bytes_per_weight(alone).get(name, 0.0)) for name in GATHERED}
        for numel in sizes:
            found += said(compare_one_process(numel, sparsity, rounds, "cpu", dtype, 2, []))
            if that_fit({f"{OURS}, {num_ranks} ranks": num_ranks * RANK_BYTES}, numel, "cpu"):
                reference = [
                    row.baseline_seconds for row in alone if (row.details["numel"], row.baseline) == (numel, REFERENCE)
                ]
                fitting = that_fit(gathering, numel, "cpu")
                found += said(compare_ranks(numel, sparsity, rounds, dtype, num_ranks, fitting, *reference))
    return found


def said(rows: list[Comparison]) -> list[Comparison]:
    """Print a line of progress for a measurement, and return its rows."""
    details = rows[0].details
    where = f"{details['numel']:,} {details['dtype']} weights on {details['device']}, {details['threads']} threads"
    print(f"{rows[0].name}: {where}: {rows[0].seconds:.3g} s", file=sys.stderr, flush=True)
    return rows


def bytes_per_weight(rows: Sequence[Comparison]) -> dict[str, float]:
    """Return the bytes per weight that peers took in one process, weights and masks included."""
    return {
        row.baseline: (extra / row.details["numel"]) + getattr(torch, row.details["dtype"]).itemsize + 1
        for row in rows
        if (extra := row.details.get("baseline_extra_bytes")) is not None
    }


def missed_goals(comparisons: list[Comparison]) -> list[str]:
    """Return a sentence for each missed goal: speed on a CPU and on a GPU, and extra memory."""
    missed = []
    for found in comparisons:
        details = found.details
        if details["numel"] < LEAST_MEASURED_NUMEL:
            continue
        where = f"{found.name} of {details['numel']:,} {details['dtype']} weights on {details['device']}"
        is_floor, on_gpu, share = found.baseline == FLOOR, details["device"] == "cuda", details.get("extra_share")
        is_event = found.name == "prune event"
        if found.baseline == REFERENCE and not on_gpu and found.ratio < LEAST_SPEEDUP:
            missed.append(f"{where}: {found.ratio:.1f} times as fast as {REFERENCE}, the goal is {LEAST_SPEEDUP:g}.")
        if is_floor and share is not None and share > MOST_EXTRA_SHARE:
            missed.append(
                f"{where}: {share:.2%} of the weights' memory beside them, the goal is {MOST_EXTRA_SHARE:.0%}."
            )
        if is_floor and on_gpu and is_event and found.seconds > MOST_EVENT_SECONDS_ON_GPU:
            missed.append(f"{where}: {found.seconds:.4f} s, the goal is {MOST_EVENT_SECONDS_ON_GPU} s.")
        if is_floor and on_gpu and not is_event and found.ratio < 1 / MOST_PASSES_ON_GPU:
            missed.append(f"{where}: {1 / found.ratio:.1f} read passes, the goal is {MOST_PASSES_ON_GPU:g}.")
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=50_000_000)
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "selection.json")
    parser.add_argument("--large", action="store_true", help="also 200 M and 1.14 B weights: takes 14 GB of memory")
    parser.add_argument("--device", action="append", choices=devices(), help="this one alone")
    parser.add_argument("--dtype", action="append", choices=list(PEERS), help="this one alone")
    options = parser.parse_args()
    sizes = [options.numel, *(LARGE if options.large else ())]
    found = measure(sizes, options.sparsity, options.rounds, options.device or devices(), options.dtype or list(PEERS))
    publish(found, options.output, ["numel", "dtype", "device", "threads", "ranks", "extra_bytes", "extra_share"])
    finish(missed_goals(found))


if __name__ == "__main__":
    main()
