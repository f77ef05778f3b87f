"""Compute the costs that grow with the number of ranks, from measured constants: events, start-up, sampling, checkpoints.

    python -m tests.benchmarks.scale [--figure docs/scale.png]     -> runs/bench/scale.json

These are measured in this run, on one thread: selection per weight and per parameter, the sampler per block, and, in torch's
fake process group, what one rank of each world does to shard a model without weights and to set up its masks. These are
assumed, as options: the latency of one hop (an all-reduce takes log2(world) hops in each direction) and a rank's bandwidth.
Everything else is arithmetic. The seconds of an event are those of a CPU; only their growth matters here.
"""

from __future__ import annotations

import argparse
import math
import pickle
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from conf.compose import composed
from conf.schema import ModelConfig
from tests.benchmarks.common import RESULTS, in_process, write_rows

OUTPUT = RESULTS / "scale.json"
MODULE = "tests.benchmarks.scale"
MODELS = ("llama2_1b", "llama2_7b", "llama2_70b")
WORLDS = (2, 8, 64, 512, 4096)
BATCH = 4096
BYTES_PER_BIN = 8
HSDP_SHARDS = 64
"""The number of ranks that share one copy of the model, if a larger world holds several copies."""


@dataclass(frozen=True)
class Constants:
    """Seconds on one thread of this machine."""

    per_weight: float
    per_shard: float
    per_block: float


@dataclass(frozen=True)
class Row:
    """The costs of one rank of a world; its bytes are those that it sends or receives."""

    model: str
    world_size: int
    local_weights: int
    event_local_seconds: float
    event_network_seconds: float
    event_bytes: int
    sharding_seconds: float
    hsdp_sharding_seconds: float | None
    bookkeeping_seconds: float
    sampling_seconds: float
    checkpoint_bytes_written: int
    checkpoint_bytes_gathered: int


def measure_constants(numel: int = 50_000_000) -> dict[str, float]:
    """Measure, in a separate process, selection over few large and many small parameters, and the blocks of a step."""
    from sparsity.mask import make_shards
    from sparsity.select import prune_smallest_
    from train.data.sampler import PermutationSampler

    torch.set_num_threads(1)

    def seconds(sizes: Sequence[int]) -> float:
        weights = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(0)).split(list(sizes))
        shards = make_shards({str(index): weight for index, weight in enumerate(weights)})
        taken = []
        for _ in range(4):
            started = time.perf_counter()
            prune_smallest_(shards, sum(sizes) // 2)
            taken.append(time.perf_counter() - started)
        return min(taken)

    few, many = [numel // 8] * 8, [numel // 512] * 512
    per_shard = max(0.0, seconds(many) - seconds(few)) / (len(many) - len(few))
    per_weight = max(1e-12, seconds(few) - len(few) * per_shard) / numel
    sampler = PermutationSampler(100_000_000, seed=0, batch_size=BATCH)
    started = time.perf_counter()
    blocks = sum(1 for _ in islice(iter(sampler), 4 * BATCH))
    return asdict(Constants(per_weight, per_shard, (time.perf_counter() - started) / blocks))


def shard_in_fake_world(model: dict[str, Any], world_size: int, shard_ranks: int) -> dict[str, float]:
    """Shard a model without weights and make its masks, as the last rank of a fake world, in a separate process.

    The world holds copies of the model, each shared by `shard_ranks` ranks: one copy is FSDP2, several are HSDP.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from transformers import LlamaForCausalLM

    from sparsity.mask import make_shards
    from sparsity.prunable import prunable_parameters
    from sparsity.shards import rank_layout
    from train.model.build import llama_config

    dist.init_process_group("fake", store=FakeStore(), rank=world_size - 1, world_size=world_size)
    started = time.perf_counter()
    with torch.device("meta"):
        llama = LlamaForCausalLM(llama_config(ModelConfig(**model)))
    mesh = init_device_mesh("cpu", (shard_ranks,))
    if shard_ranks < world_size:
        mesh = init_device_mesh("cpu", (world_size // shard_ranks, shard_ranks), mesh_dim_names=("replicate", "shard"))
    for block in llama.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(llama, mesh=mesh)
    sharded = time.perf_counter()
    parameters = prunable_parameters(llama)
    rank_layout(list(parameters.values()))
    shards = make_shards(parameters)
    kept = time.perf_counter()
    return {
        "sharding_seconds": sharded - started,
        "bookkeeping_seconds": kept - sharded,
        "local_weights": sum(shard.values.numel() for shard in shards),
        "num_shards": len(shards),
    }


def event_traffic(num_shards: int, world_size: int) -> tuple[int, int]:
    """Return the number of all-reduces of an event, and the bytes of one rank's counts in them.

    The counts are two histograms for the sample, two for the candidates, those around the bracket, the ties of each
    parameter, one for each rank, and the kept weights of each parameter.
    """
    from sparsity.select.search import NUM_BIN_BITS

    counts = [*[1 << NUM_BIN_BITS] * 4, 2, num_shards, world_size, num_shards]
    return len(counts), BYTES_PER_BIN * sum(counts)


def gathered_bytes(world_size: int) -> int:
    """Return the bytes that rank 0 receives at a checkpoint: checksum and size of every file (`train.checkpoints.write`).

    They grow with the world, but only on that rank.
    """
    return world_size * len(pickle.dumps(("0" * 64, 1 << 40)))


def row(
    model: str,
    total: int,
    world_size: int,
    constants: Constants,
    found: dict[str, Any],
    hsdp_sharding_seconds: float | None,
    network: tuple[float, float],
) -> Row:
    latency, bandwidth = network
    num_reduces, num_bytes = event_traffic(found["num_shards"], world_size)
    return Row(
        model=model,
        world_size=world_size,
        local_weights=found["local_weights"],
        event_local_seconds=found["local_weights"] * constants.per_weight + found["num_shards"] * constants.per_shard,
        event_network_seconds=2 * num_reduces * latency * math.ceil(math.log2(world_size)) + 2 * num_bytes / bandwidth,
        event_bytes=num_bytes,
        sharding_seconds=found["sharding_seconds"],
        hsdp_sharding_seconds=hsdp_sharding_seconds,
        bookkeeping_seconds=found["bookkeeping_seconds"],
        # Every rank computes the order of the whole batch and takes its share.
        sampling_seconds=BATCH * constants.per_block,
        # Weights and two moments in float32, and a bit for each prunable weight.
        checkpoint_bytes_written=12 * total // world_size + found["local_weights"] // 8,
        checkpoint_bytes_gathered=gathered_bytes(world_size),
    )


def measure(models: Sequence[str], worlds: Sequence[int], latency: float, bandwidth: float) -> list[Row]:
    from train.plan.counts import count_parameters

    constants = Constants(**in_process(MODULE, "measure_constants"))
    rows = []
    for name in models:
        model = composed("train", [f"model={name}", "data=text", "data.path=unused"]).model
        for world_size in worlds:
            found = in_process(MODULE, "shard_in_fake_world", asdict(model), world_size, world_size)
            hsdp = None
            if world_size > HSDP_SHARDS:
                copies = in_process(MODULE, "shard_in_fake_world", asdict(model), world_size, HSDP_SHARDS)
                hsdp = copies["sharding_seconds"]
            total = count_parameters(model).total
            rows.append(row(model.name, total, world_size, constants, found, hsdp, (latency, bandwidth)))
    return rows


def table(rows: Sequence[Row]) -> str:
    """Return the rows in Markdown."""
    lines = [
        "| model | ranks | weights a rank | event, this rank | event, network | sent in it | sharding | "
        f"sharding, copies of {HSDP_SHARDS} ranks | masks | a step's order | checkpoint a rank | told rank 0 |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        hsdp = "" if r.hsdp_sharding_seconds is None else f"{r.hsdp_sharding_seconds:.2f} s"
        lines.append(
            f"| {r.model} | {r.world_size:,} | {r.local_weights:,} | {r.event_local_seconds:.3g} s | "
            f"{1e3 * r.event_network_seconds:.2f} ms | {r.event_bytes / 1e3:.0f} kB | {r.sharding_seconds:.2f} s | {hsdp} | "
            f"{r.bookkeeping_seconds:.3f} s | {1e3 * r.sampling_seconds:.1f} ms | "
            f"{r.checkpoint_bytes_written / 1e6:,.0f} MB | {r.checkpoint_bytes_gathered / 1e3:.1f} kB |"
        )
    return "\n".join(lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw four panels over the number of ranks, with a line for each model; the rank axis is log2."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.4), layout="constrained")
    panels = {
        "prune event: selection on this rank [s]": ("log", ["event_local_seconds"], 1),
        "prune event: network [ms], all models alike": ("linear", ["event_network_seconds"], 1e3),
        "start-up: masks [s]": ("log", ["bookkeeping_seconds"], 1),
        f"start-up: torch's fully_shard [s]; pale: in copies of {HSDP_SHARDS} ranks": (
            "log",
            ["sharding_seconds", "hsdp_sharding_seconds"],
            1,
        ),
    }
    worlds = sorted({r.world_size for r in rows})
    for axes, (title, (scale, fields, unit)) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        for model, style in zip(dict.fromkeys(r.model for r in rows), cycle(("o-", "s--", "^:")), strict=False):
            color = None
            for field, alpha in zip(fields, (1.0, 0.4), strict=False):
                known = [r for r in rows if r.model == model and getattr(r, field) is not None]
                (line,) = axes.plot(
                    [r.world_size for r in known],
                    [unit * getattr(r, field) for r in known],
                    style,
                    markersize=4,
                    label=None if color else model,
                    color=color,
                    alpha=alpha,
                )
                color = line.get_color()
        axes.set_xscale("log", base=2)
        axes.set_xticks(worlds, [f"{world:,}" for world in worlds])
        axes.set(yscale=scale, xlabel="ranks")
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.3)
        if scale == "linear":
            axes.set_ylim(bottom=0)
    figure.axes[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--worlds", nargs="+", type=int, default=list(WORLDS))
    parser.add_argument("--latency", type=float, default=10e-6, help="seconds of one hop (assumed)")
    parser.add_argument("--bandwidth", type=float, default=25e9, help="bytes a second of one rank (assumed)")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    rows = measure(options.models, options.worlds, options.latency, options.bandwidth)
    print(table(rows))
    write_rows([asdict(row) for row in rows], options.output)
    if options.figure:
        draw(rows, options.figure)
    print(options.output)


if __name__ == "__main__":
    main()
