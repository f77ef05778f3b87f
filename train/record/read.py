"""Reading the files in a run's folder: the summary of a finished run, the records, the configuration."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, TypeGuard

from omegaconf import OmegaConf

from conf.schema import Config
from train.plan.run import RunPlan

CONFIG, METRICS, SUMMARY, SAMPLE = "config.yaml", "metrics.jsonl", "summary.json", "sample.txt"


def read_summary(file: Path) -> dict[str, Any]:
    """Return the figures of a finished run, with the name of its folder as `run_name`.

    Raises:
        ValueError: The file is not a JSON table.
        OSError: The file cannot be read.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}): finish the run again, or leave it out.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} is not a run's summary: leave this run out.")
    return {**found, "run_name": file.parent.name}


def read_records(file: Path) -> list[dict[str, Any]]:
    """Return the records in the complete lines of a metrics.jsonl; a live run may be writing the last line.

    Raises:
        ValueError: A line is not JSON, or a record does not have its step and tokens.
    """
    lines = file.read_bytes().split(b"\n")[:-1]
    try:
        records = [json.loads(line) for line in lines]
    except ValueError as error:
        raise ValueError(f"{file} is not a file of records ({error}): leave this run out.") from None
    for number, record in enumerate(records, start=1):
        _check_record(f"{file} line {number}", record)
    return records


def read_config(file: Path) -> Config:
    """Return a run's configuration; a key that a later version added has its default.

    Raises:
        ValueError: The file is garbled, or another version of the project wrote it.
        OSError: The file cannot be read.
    """
    try:
        # OmegaConf's loader creates no objects from tags.
        merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(file))
        config: Any = OmegaConf.to_object(merged)
    except Exception as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise ValueError(f"{file} is garbled or of another version: leave this run out.") from None
    return config


def measured_loss(plan: RunPlan) -> dict[str, float | None]:
    """Return the final training loss and its standard deviation if the planned run is already finished."""
    names = ("final_train_loss", "final_train_loss_std")
    try:
        summary = read_summary(plan.run_dir / SUMMARY)
    except (OSError, ValueError):
        return dict.fromkeys(names)
    same = {"steps": plan.num_steps, "total_tokens": plan.total_tokens, "linear_params": plan.counts.linear}
    is_same = all(summary.get(key) == value for key, value in same.items())
    return {name: summary.get(name) if is_same else None for name in names}


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether a value read from JSON is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_record(where: str, record: Any) -> None:
    if not isinstance(record, dict):
        raise ValueError(f"{where} is not a record: leave this run out.")
    # An evaluation may come before the first step.
    first_step = 1 if "train/loss" in record else 0
    for key, least in (("train/global_step", first_step), ("train/tokens", 0)):
        value = record.get(key)
        if not is_number(value) or value < least:
            raise ValueError(f"{where} has {key}={value}, and records count from {least}: leave this run out.")
