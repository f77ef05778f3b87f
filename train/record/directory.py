"""A run's folder, which belongs to one configuration and can be claimed by one process at a time.

runs/NAME/  config.yaml  environment.json  metrics.jsonl  summary.json  report.png  model/  checkpoints/  wandb/
           profile/
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import OmegaConf

from conf.schema import Config, tokenizer_of
from sparsity.common.files import check_room, write_atomically
from train.checkpoints.layout import checkpoints, remove_leftovers
from train.plan.branch import BRANCH
from train.plan.disk import bytes_below
from train.plan.settings import plain_settings
from train.record.read import CONFIG, METRICS, SAMPLE, SUMMARY, read_summary

NOT_PART_OF_A_RUN = (
    "overwrite", "resume", "dry_run", "launch", "logger", "runs_dir", "card", "max_skipped", "next_commands", "prompt",
    "data.cache_dir", "data.num_workers", "trainer.save_steps",
    "trainer.save_total_limit", "trainer.ddp_timeout", "trainer.disable_tqdm", "trainer.dataloader_num_workers",
    "trainer.dataloader_prefetch_factor", "trainer.per_device_train_batch_size", "trainer.per_device_eval_batch_size",
    "trainer.gradient_accumulation_steps", "trainer.profile_steps", "trainer.async_save", "trainer.keep_steps",
)  # fmt: skip
"""Keys that may differ when a run is started again. Those on which a step depends are checked against the checkpoint."""

LOCK_PATIENCE_S = 3.0
"""The seconds to wait for a lock: after a run is killed, its ranks still hold it for a moment."""
LAUNCH_PATIENCE_S = 10.0
"""The same before the ranks start, which themselves would take seconds to find the lock."""


class RunDirectory:
    """The paths of a run, and a lock on them that one process holds while it lives."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / CONFIG
        self.branch = path / BRANCH
        self.environment = path / "environment.json"
        self.metrics = path / METRICS
        self.summary = path / SUMMARY
        self.report = path / "report.png"
        self.sample = path / SAMPLE
        self.model = path / "model"
        self.checkpoints = path / "checkpoints"
        self.wandb = path / "wandb"
        self.profile = path / "profile"
        self._lock = FileLock(path / ".lock")

    def claim(self, config: Config, needed_bytes: int) -> dict[str, Any] | None:
        """Lock the folder for this process, and empty it if `overwrite` is set.

        Returns:
            The summary if the folder's run is finished, else None.

        Raises:
            ValueError: A live process, another config or other files use the folder, `resume` forbids it, or the
                disk has no room for `needed_bytes`.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._acquire(LOCK_PATIENCE_S)
        again = is_restart(os.environ)
        if config.overwrite and not again:
            self._empty()
        elif self.config.exists():
            if (summary := self.finished(config)) is not None:
                return summary
            if config.resume == "never" and not again:
                raise ValueError(
                    f"{self.path} holds an unfinished run, but resume=never: set overwrite=true to start it over, or "
                    "resume=auto to resume it."
                )
        elif self.branch.exists():
            # The start of a branch was interrupted before its files were complete.
            self._empty()
        elif any(entry.name != ".lock" and entry.suffix != ".partial" for entry in self.path.iterdir()):
            raise ValueError(
                f"{self.path} holds files that do not belong to a run: use another run_name, or set overwrite=true."
            )
        remove_leftovers(self.checkpoints)
        if config.resume == "must" and not checkpoints(self.checkpoints):
            raise ValueError(
                f"{self.path} has no checkpoint to resume from, but resume=must: set resume=auto to start."
            )
        check_room(
            self.path, needed_bytes - bytes_below(self.checkpoints), "the run",
            "lower trainer.save_total_limit, or choose another runs_dir",
        )  # fmt: skip
        return None

    def check_free(self) -> None:
        """Check that no live process has claimed the folder, before processes start that would be refused.

        Raises:
            ValueError: One has.
        """
        if Path(self._lock.lock_file).exists():
            self._acquire(LAUNCH_PATIENCE_S)
            self._lock.release()

    def _acquire(self, patience_s: float) -> None:
        try:
            self._lock.acquire(timeout=patience_s)
        except Timeout:
            raise ValueError(
                f"{self.path} is in use by a live process: wait for it or end it, or use another run_name."
            ) from None

    def is_in_use(self) -> bool:
        """Return whether a live process has claimed the folder."""
        if not Path(self._lock.lock_file).exists():
            return False
        try:
            with self._lock.acquire(timeout=0):
                return False
        except Timeout:
            return True

    def finished(self, config: Config) -> dict[str, Any] | None:
        """Return the summary if this configuration's run is finished, else None.

        Raises:
            ValueError: The folder belongs to another configuration.
        """
        if not self.config.exists():
            return None
        self._check_same(config)
        return self._read_summary() if self.summary.exists() else None

    def begin(self, config: Config, note: str = "") -> None:
        """Save the configuration in the folder, which marks it as this run's; a resumed run keeps its first configuration.

        Args:
            config: The run's configuration.
            note: Text for a comment at the top of the file.
        """
        if self.config.exists():
            return
        chosen = replace(config, tokenizer=tokenizer_of(config))
        comment = f"# {' '.join(note.split())}\n" if note else ""
        write_atomically(self.config, comment + OmegaConf.to_yaml(OmegaConf.structured(chosen)))

    def _empty(self) -> None:
        """Remove the files that a run writes; other files stay."""
        for file in (self.config, self.branch, self.environment, self.metrics, self.summary, self.report, self.sample):
            file.unlink(missing_ok=True)
        for partial in self.path.glob(".*.partial"):
            partial.unlink()
        for folder in (self.model, self.model.with_name("model.tmp"), self.checkpoints, self.wandb, self.profile):
            shutil.rmtree(folder, ignore_errors=True)

    def _read_summary(self) -> dict[str, Any]:
        try:
            return read_summary(self.summary)
        except ValueError:
            raise ValueError(
                f"{self.summary} is garbled: remove it and rerun the same command to write it again, or set "
                "overwrite=true."
            ) from None

    def _check_same(self, config: Config) -> None:
        try:
            # OmegaConf's loader creates no objects from tags, and interpolations are not resolved.
            before = run_identity(OmegaConf.load(self.config))
        except Exception as error:
            if isinstance(error, OSError) and error.errno:
                raise
            raise ValueError(
                f"{self.config} is garbled or was not written by a run: set overwrite=true to start it over."
            ) from None
        now = run_identity(config)
        if changed := _differences(before, now):
            raise ValueError(
                f"{self.path} is in use by a run with another config ({'; '.join(changed)}): use another run_name, or set "
                "overwrite=true to start it over."
            )


def is_restart(environment: Mapping[str, str]) -> bool:
    """Return whether torch's agent or SLURM has repeated the command after a failure, so that it must resume."""
    return any(environment.get(f"{who}_RESTART_COUNT", "0") != "0" for who in ("TORCHELASTIC", "SLURM"))


def run_identity(config: Any) -> dict[str, Any]:
    """Return the settings that must match for two commands to mean the same run."""
    plain = plain_settings(config)
    for path in NOT_PART_OF_A_RUN:
        group, _, key = path.rpartition(".")
        (plain[group] if group else plain).pop(key, None)
    return plain


def _differences(before: Any, now: Any, prefix: str = "") -> list[str]:
    """Return dotted keys whose values differ, with both values."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = list(dict.fromkeys([*before, *now]))
        found = [_differences(before.get(key), now.get(key), f"{prefix}.{key}".lstrip(".")) for key in keys]
        return [difference for differences in found for difference in differences]
    return [] if before == now else [f"{prefix} was {before}, is {now}"]
