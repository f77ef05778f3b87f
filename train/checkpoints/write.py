"""Writing a checkpoint: every rank writes its own file, rank 0 the rest; the folder gets its name only when complete."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from torch import Tensor

from conf.cli import sentence
from sparsity.common.files import publish_folder, remove_folder, sha256_of, sync, write_synced
from train.checkpoints import layout
from train.checkpoints.contents import Pieces
from train.checkpoints.tensorfile import file_bytes, write_tensors
from train.distributed import World
from train.faults.stop import RunStopped


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint to write: this rank's contents, and what rank 0 calls before and after."""

    root: Path
    """The folder of the run's checkpoints."""
    step: int
    """The number of steps trained so far."""
    world: World
    tensors: Mapping[str, Tensor]
    """The contents of this rank's file."""
    pieces: Pieces
    """The rows in each rank's file."""
    state: dict[str, Any]
    """The contents of state.json, without the entries that `finish_checkpoint` adds."""
    save_trainer_state: Callable[[str], None]
    """Writes transformers' own state to a path."""
    before: Callable[[], None] = lambda: None
    """Called before anything is written."""
    after: Callable[[], object] = lambda: None
    """Called after the checkpoint has appeared."""

    @property
    def aside(self) -> Path:
        """The folder that it is written in until it is complete."""
        return layout.aside_of(self.root, self.step)

    @property
    def folder(self) -> Path:
        """The folder that it is in once it is complete."""
        return layout.folder_of(self.root, self.step)


def write_checkpoint(checkpoint: Checkpoint) -> Path:
    """Write a checkpoint, which appears complete or not at all.

    What a rank sends does not grow with the number of ranks: flags, and a checksum and a size to rank 0.

    Collective: every rank calls it.

    Returns:
        The checkpoint's folder.

    Raises:
        RunStopped: On every rank, if one of them could not write. The incomplete files are removed; older checkpoints
            stay.
    """
    return finish_checkpoint(checkpoint, begin_checkpoint(checkpoint))


def begin_checkpoint(checkpoint: Checkpoint) -> int:
    """Create the temporary folder, save the Trainer's state in it, and return the bytes that all ranks will write.

    Collective: every rank calls it.
    """
    world, aside = checkpoint.world, checkpoint.aside
    needed = int(world.sum(torch.tensor(file_bytes(checkpoint.tensors), device=world.device)))

    def begin() -> None:
        checkpoint.before()
        remove_folder(aside)
        aside.mkdir(parents=True)
        checkpoint.save_trainer_state(str(aside / layout.TRAINER_STATE))
        sync(aside / layout.TRAINER_STATE)

    _together(checkpoint, begin if world.is_main else None, needed)
    return needed


def finish_checkpoint(checkpoint: Checkpoint, needed: int) -> Path:
    """Write every rank's file and the rest, then give the folder its final name, and return it.

    Collective: every rank calls it.

    Args:
        checkpoint: The checkpoint.
        needed: The bytes that all ranks write, for the error about a full disk.

    Raises:
        RunStopped: On every rank, if one of them could not write.
    """
    world, aside = checkpoint.world, checkpoint.aside

    def write() -> tuple[str, int]:
        digest = write_tensors(aside / layout.rank_file(world.rank), checkpoint.tensors)
        return digest, file_bytes(checkpoint.tensors)

    written = world.to_main(_together(checkpoint, write, needed))

    def finish() -> None:
        files = {layout.rank_file(rank): report for rank, report in enumerate(written)}
        whole = {
            "format": layout.FORMAT,
            "step": checkpoint.step,
            "world_size": world.size,
            "versions": versions(),
            **checkpoint.state,
            "pieces": asdict(checkpoint.pieces),
            "bytes": {name: report[1] for name, report in files.items()},
        }
        write_synced(aside / layout.STATE, json.dumps(whole) + "\n")
        sums = {name: report[0] for name, report in files.items()}
        sums |= {name: sha256_of(aside / name) for name in (layout.STATE, layout.TRAINER_STATE)}
        write_synced(aside / layout.SUMS, "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())))
        publish_folder(aside, checkpoint.folder)

    _together(checkpoint, finish if world.is_main else None, needed)
    if world.is_main:
        checkpoint.after()
    return checkpoint.folder


def _together(checkpoint: Checkpoint, action: Callable[[], Any] | None, needed: int) -> Any:
    """Return the result of this rank's `action`; raise RunStopped on all ranks if one failed. Every rank calls it."""
    result, problem = attempt(action) if action else (None, None)
    if problems := checkpoint.world.problems(problem):
        if checkpoint.world.is_main:
            remove_folder(checkpoint.aside)
        raise RunStopped(_failure(checkpoint.folder, problems[0], needed))
    return result


def attempt(action: Callable[[], Any]) -> tuple[Any, str | None]:
    """Return (the action's result, None), or (None, the operating system's error in a sentence)."""
    try:
        return action(), None
    except OSError as error:
        return None, sentence(error)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries on which a checkpoint depends."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
    }


def _failure(folder: Path, problem: str, needed: int) -> str:
    kept = layout.checkpoints(folder.parent)
    rest = f"{kept[0]} is complete, rerun the same command to resume" if kept else "there is no checkpoint before it"
    return f"{folder} could not be saved, it takes {needed:,} bytes: {problem.rstrip('.')}; {rest}."
