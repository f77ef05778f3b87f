"""Bytes of host memory that one rank of a run holds."""

from __future__ import annotations

from dataclasses import dataclass

from conf.schema import ModelConfig
from train.plan.architecture import describe
from train.plan.counts import count_parameters
from train.plan.memory import FLOAT32_BYTES


@dataclass(frozen=True)
class HostMemory:
    """Bytes of host memory that one rank holds, without Python and its libraries.

    Weights are drawn or read one layer at a time (`train.model.weights`), and the model is exported one file at a time
    (`train.model.export`).
    """

    layer: int
    """A whole layer in float32: the largest of a block, the embedding and the head."""
    shard: int
    """The rank's part of the weights, which is in host memory too if there is no GPU."""
    export: int
    """One file of the exported model, on rank 0 only."""


def host_memory(model: ModelConfig, world_size: int, export_dtype: str, max_shard_size: str) -> HostMemory:
    """Return the host memory that one rank needs.

    Args:
        model: The model.
        world_size: The number of ranks.
        export_dtype: The dtype of the exported model.
        max_shard_size: The largest size of an exported file, such as 5GB.
    """
    counts = count_parameters(model)
    layer = max(counts.linear_per_layer + 2 * model.hidden_size, model.vocab_size * model.hidden_size)
    if model.path is not None:
        layer = describe(model).largest_unit
    exported = counts.total * (2 if export_dtype == "bfloat16" else FLOAT32_BYTES)
    return HostMemory(
        layer=FLOAT32_BYTES * layer,
        shard=FLOAT32_BYTES * -(-counts.total // world_size),
        export=min(exported, parse_bytes(max_shard_size)),
    )


def parse_bytes(text: str) -> int:
    """Return a size in bytes: 141e9 for 141GB, 80 x 2^30 for 80GiB; a bare number is bytes.

    Raises:
        ValueError: The text is not a size.
    """
    units = {"TB": 10**12, "GB": 10**9, "MB": 10**6, "TiB": 1 << 40, "GiB": 1 << 30, "MiB": 1 << 20, "B": 1}
    unit = next((name for name in sorted(units, key=len, reverse=True) if text.strip().endswith(name)), "")
    try:
        size = float(text.strip().removesuffix(unit)) * units.get(unit, 1)
    except ValueError:
        size = 0.0
    if not 0 < size < float("inf"):
        raise ValueError(f"device_memory={text} is not an amount of memory: give a number with GB or GiB, like 141GB.")
    return int(size)
