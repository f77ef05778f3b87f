"""The choice of the checkpoint to resume, and the check that it and its data still belong to this run."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from sparsity.common.files import sha256_of
from train.checkpoints.layout import STATE, newest_whole, step_of
from train.data.index import INDEX, read_index
from train.data.pack import SPLITS
from train.distributed import World


def checkpoint_to_resume(
    root: Path, identity: dict[str, Any], data_folder: str, world: World, branch_step: int | None = None
) -> Path | None:
    """Return the newest complete checkpoint of the run, or None; warn about damaged ones.

    Collective: every rank calls it.

    Args:
        root: The folder of the checkpoints.
        identity: The settings that must match.
        data_folder: The folder of the run's prepared data.
        world: This process and its peers.
        branch_step: The step of the checkpoint that came from another run. It is not compared again: that was done when
            this run branched.

    Raises:
        RunStopped: On every rank, if there are checkpoints but all are damaged.
        SystemExit: On every rank, if the checkpoint belongs to other settings or its data has changed.
    """
    folder, warnings = newest_whole(root, world)
    if world.is_main:
        for warning in warnings:
            print(f"warning: {warning}.", file=sys.stderr, flush=True)
    if folder is not None and step_of(folder) != branch_step:
        world.on_main(check_is_of_this_run, folder, identity, data_folder)
    return folder


def check_is_of_this_run(folder: Path, identity: dict[str, Any], data_folder: str) -> None:
    """Check that the checkpoint's settings and data are those of this run.

    Args:
        folder: The checkpoint.
        identity: The settings of this run that must match.
        data_folder: The folder of this run's prepared data.

    Raises:
        ValueError: A setting differs, and the message gives both values; or the data has changed.
    """
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    for key, now in identity.items():
        before = state["identity"].get(key)
        if before != json.loads(json.dumps(now)):
            raise ValueError(
                f"{folder} was written with {key}={before}, but this run has {key}={now}: use the same batch_size and "
                "number of steps, or set overwrite=true to start over."
            )
    check_data(state["carried"]["data"], data_folder)


def data_fingerprint(folder: str) -> dict[str, Any]:
    """Return the sha256 of the prepared data's index, and the size and mtime of each file that the index lists.

    The index holds the sha256 of each file.
    """
    index = read_index(folder)
    names = [part[split][kind] for part in index["parts"] for split in SPLITS for kind in ("file", "starts")]
    stats = {name: Path(folder, name).stat() for name in names}
    times = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    return {"index": sha256_of(Path(folder, INDEX)), "files": times}


def check_data(before: dict[str, Any], folder: str) -> None:
    """Check that the data is unchanged; only files with a new size or mtime are read again.

    Raises:
        ValueError: The data has changed since the fingerprint `before` was taken.
    """
    now = data_fingerprint(folder)
    if before["index"] not in (now["index"], _older_index(folder)):
        raise ValueError(
            f"The training data has changed since the run began ({folder} has another index): restore the data, or set "
            "overwrite=true to start over."
        )
    sums = {
        part[split][name]: part[split][sha256]
        for part in read_index(folder)["parts"]
        for split in SPLITS
        for name, sha256 in (("file", "sha256"), ("starts", "starts_sha256"))
    }
    for name, state in now["files"].items():
        if state != before["files"].get(name) and sha256_of(Path(folder, name)) != sums[name]:
            raise ValueError(
                f"{Path(folder, name)} has changed since the run began: delete {folder} so that it is prepared again, or "
                "set overwrite=true to start over."
            )


def _older_index(folder: str) -> str:
    """Return the sha256 that the index had before `first_id` was added to it, so that runs that began then resume."""
    index = {key: value for key, value in read_index(folder).items() if key != "first_id"}
    return hashlib.sha256(json.dumps(index, indent=1).encode()).hexdigest()
