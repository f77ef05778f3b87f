"""Finished runs as trials of their settings: figures by seed, and their mean and spread."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.schema import Config
from eval.runs.figures import check_comparable, finished_runs, positive
from sparsity.common.text import half_up
from train.plan.compute import Flops, run_flops
from train.plan.run import plan_run
from train.record.directory import run_identity
from train.record.read import CONFIG, is_number, read_config
from train.record.siblings import has_sparse_weights

SEEDS = ("trainer.seed", "trainer.data_seed")
NAMES = ("run_name", "sweep_name")
WITHOUT_EFFECT = (
    "eval.", "export.", "trainer.logging_", "trainer.eval_", "trainer.save_", "trainer.disable_", "trainer.dataloader_",
)  # fmt: skip
"""Beginnings of keys on which neither the trained weights nor the held-out loss depend."""
SPARSITY, MATCH = "sparsity.", "model.match"
WITHOUT_EFFECT_ON_TWINS = tuple(
    f"{SPARSITY}{key}" for key in ("score", "factors", "normalize", "moves.", "calibration")
)
"""Beginnings of keys of the group `sparsity` that do not change N-bar, the only thing that a dense twin takes from it."""


@dataclass(frozen=True)
class Trial:
    """One finished run: its settings by dotted key, those of `effective`, and its figures; loss in nats per token."""

    settings: Mapping[str, Any]
    seed: int
    is_sparse: bool
    avg_linear_params: float
    final_linear_params: float
    total_tokens: float
    loss: float
    bits_per_byte: float
    flops: Flops | None
    """Training FLOPs; None if an older run left none and its config cannot be planned here."""


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds; with one seed the deviation is None."""

    mean: float
    std: float | None
    num: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of the values of several seeds."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def spread_text(spread: Spread, sign: bool = False) -> str:
    """Return mean ± standard deviation; `sign` writes a plus too."""
    plus = "+" if sign and spread.mean >= 0 else ""
    deviation = "" if spread.std is None else f" ± {half_up(spread.std, 4)}"
    return f"{plus}{half_up(spread.mean, 4)}{deviation}"


def read_trials(patterns: Sequence[str]) -> list[Trial]:
    """Read the finished runs that `patterns` name.

    Raises:
        ValueError: A run has no config.yaml, or the losses cannot be compared.
    """
    rows = finished_runs(patterns)
    check_comparable(rows)
    return [_trial(Path(where), row) for where, row in rows.items()]


def effective(settings: Mapping[str, Any], is_sparse: bool) -> dict[str, Any]:
    """Return the settings on which a run's figures depend, without seeds and names.

    A dense run has none of the group `sparsity`, and a dense twin those that give its size.
    """
    dropped: tuple[str, ...] = WITHOUT_EFFECT
    if not is_sparse:
        dropped += WITHOUT_EFFECT_ON_TWINS if settings.get(MATCH) else (SPARSITY,)
    left = {key: value for key, value in settings.items() if not key.startswith(dropped)}
    return {key: value for key, value in left.items() if key not in (*SEEDS, *NAMES)}


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys whose values differ."""
    keys = dict.fromkeys(key for one in settings for key in one)
    return [key for key in keys if len({json.dumps(one.get(key)) for one in settings}) > 1]


def key_of(settings: Mapping[str, Any]) -> str:
    """Return settings as a string that can be compared and hashed."""
    return json.dumps(dict(settings), sort_keys=True)


def _trial(summary_file: Path, row: Mapping[str, Any]) -> Trial:
    config_file = summary_file.with_name(CONFIG)
    if not config_file.exists():
        raise ValueError(
            f"{summary_file} has no config.yaml beside it: give run folders, whose settings can be compared."
        )
    config, where = read_config(config_file), str(summary_file)
    settings, is_sparse = _settings(config_file, config), has_sparse_weights(row)
    return Trial(
        settings=effective(settings, is_sparse),
        seed=settings["trainer.seed"],
        is_sparse=is_sparse,
        avg_linear_params=positive(where, row, "avg_linear_params"),
        final_linear_params=positive(where, row, "nonzero_linear_params"),
        total_tokens=positive(where, row, "total_tokens"),
        loss=positive(where, row, "heldout_loss"),
        bits_per_byte=positive(where, row, "bits_per_byte"),
        flops=_flops(config, row),
    )


def _flops(config: Config, row: Mapping[str, Any]) -> Flops | None:
    """Return a run's training FLOPs: those of its summary, or for older runs those of its config and its N-bar."""
    dense, average = (row.get(f"training_flops_{kind}") for kind in ("dense", "average"))
    if is_number(dense) and is_number(average):
        return Flops(float(dense), float(average))
    try:
        plan = plan_run(config, int(row.get("world_size", 1)))
    except (OSError, ValueError):
        return None
    return run_flops(plan, row["avg_linear_params"])


def _settings(config_file: Path, config: Config) -> dict[str, Any]:
    """Return a run's settings by dotted key.

    Raises:
        ValueError: The file is garbled or was written by another version.
    """
    try:
        settings = dict(flat(run_identity(config)))
        json.dumps([settings[SEEDS[0]], settings], allow_nan=False)
    except Exception as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise ValueError(f"{config_file} is garbled or from another version: leave this run out.") from None
    return settings


def flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return the dotted keys and the values of nested dicts."""
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        found += flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return found
