"""Reading an offline .wandb file: a 7-byte header, then LevelDB-style log blocks of 32 KiB."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEADER = 32768, 7
FULL, LAST = 1, 4


def read_records(path: Path) -> Iterator[Record]:
    data, position, record = path.read_bytes(), HEADER, b""
    while position + HEADER <= len(data):
        room = BLOCK - position % BLOCK
        if room < HEADER:
            position += room
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        record += data[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if kind in (FULL, LAST):
            yield Record.FromString(record)
            record = b""


def read_history(path: Path) -> list[dict[str, Any]]:
    """Return the logged records, each as a dictionary."""
    return [_values(r.history.item) for r in read_records(path) if r.WhichOneof("record_type") == "history"]


def read_summary(path: Path) -> dict[str, Any]:
    """Return the run's final summary."""
    summary: dict[str, Any] = {}
    for record in read_records(path):
        if record.WhichOneof("record_type") == "summary":
            summary |= _values(record.summary.update)
    return summary


def read_config(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for record in read_records(path):
        if record.WhichOneof("record_type") in ("run", "config"):
            updates = record.run.config.update if record.HasField("run") else record.config.update
            config |= _values(updates)
    return config


def read_labels(path: Path) -> tuple[str, str, list[str]]:
    """Return (group, job type, tags) of the run."""
    run = next(record.run for record in read_records(path) if record.WhichOneof("record_type") == "run")
    return run.run_group, run.job_type, list(run.tags)


def step_metrics(path: Path) -> dict[str, str]:
    """Return the x axis of each metric or group of metrics for which one is defined."""
    return {
        record.metric.name or record.metric.glob_name: record.metric.step_metric
        for record in read_records(path)
        if record.WhichOneof("record_type") == "metric"
    }


def _values(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
