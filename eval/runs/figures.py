"""The figures of many finished runs, read from the summaries in their folders or from the lines of CSV files."""

from __future__ import annotations

import csv
import glob
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.runs.folders import named_places, run_folders
from train.record.read import SUMMARY, read_summary

UNITS = {"K": 1e3, "k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12, "%": 0.01}
SAME_TOKENIZER = 0.03
"""The relative difference of held-out tokens per byte that another window length can cause; tokenizers differ by more."""


def finished_runs(runs: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """Return the figures of every finished run that the patterns name, each run once, by the file that they come from.

    Raises:
        ValueError: A pattern names no finished run.
    """
    rows: dict[str, Mapping[str, Any]] = {}
    for pattern in runs:
        found = dict(_rows(pattern))
        if not found:
            raise ValueError(f"runs={pattern} holds no finished run: name folders with a summary.json, or a CSV file.")
        rows |= found
    return rows


def check_comparable(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Check that the losses of the runs can be compared: all runs have the same data and the same tokenizer.

    Raises:
        ValueError: Data or tokenizers differ.
    """
    data = sorted({str(row["data"]) for row in rows.values() if "data" in row})
    if len(data) > 1:
        raise ValueError(
            f"the runs are trained on {' and '.join(data)}, whose losses do not compare: give those of one."
        )
    fertile = {
        row["heldout_tokens"] / row["heldout_bytes"]: where
        for where, row in rows.items()
        if isinstance(row.get("heldout_tokens"), int) and isinstance(row.get("heldout_bytes"), int)
        if row["heldout_tokens"] > 0 and row["heldout_bytes"] > 0
    }
    if fertile and max(fertile) > (1 + SAME_TOKENIZER) * min(fertile):
        raise ValueError(
            f"{fertile[min(fertile)]} and {fertile[max(fertile)]} cut their held-out text into {min(fertile):.3f} and "
            f"{max(fertile):.3f} tokens a byte, so that their losses do not compare: give runs of one tokenizer."
        )


def positive(where: str, row: Mapping[str, Any], key: str) -> float:
    """Return a run's figure `key`, which must be finite and above 0; `where` names the run in errors.

    Raises:
        ValueError: The run has no such figure, or it is not such a number.
    """
    if key not in row:
        raise ValueError(f"{where} has no figure {key}: leave this run out.")
    number = number_of(where, key, row[key])
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{where} has {key}={number:g}, which is not a finite number above 0: leave this run out.")
    return number


def number_of(where: str, key: str, value: Any) -> float:
    """Return a figure as a number; text such as 1.02B, 89.6 M or 20.00% is accepted too.

    Raises:
        ValueError: The figure is not a number.
    """
    text = str(value).strip()
    unit = UNITS.get(text[-1:], 1.0)
    try:
        return float(text.rstrip("".join(UNITS)).replace(",", "").replace("_", "")) * unit
    except ValueError:
        raise ValueError(f"{where} has {key}={text}, which is not a number: write 1234, 1.2e3 or 1.2K.") from None


def _rows(pattern: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (place, figures) of every finished run that a pattern names; skip unfinished runs."""
    for place in named_places(pattern):
        if place.is_file() and place.suffix == ".csv":
            yield from _csv_rows(place)
        elif place.is_dir():
            for folder in run_folders(place, SUMMARY):
                yield str((folder / SUMMARY).resolve()), _told(folder / SUMMARY)
        elif place.name == SUMMARY:
            yield str(place.resolve()), _told(place)
        elif not glob.has_magic(pattern):
            raise ValueError(
                f"runs={pattern} is not a run: give a folder with a summary.json, or a file that ends in .csv."
            )


def _csv_rows(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with file.open(newline="", encoding="utf-8-sig") as lines:
        for number, row in enumerate(csv.DictReader(lines, skipinitialspace=True), start=2):
            yield f"{file} line {number}", {key: value for key, value in row.items() if key and value not in (None, "")}


def _told(file: Path) -> Mapping[str, Any]:
    """Return the measured figures of a summary."""
    return {key: value for key, value in read_summary(file).items() if value is not None}
