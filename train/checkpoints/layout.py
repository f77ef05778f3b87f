"""Checkpoints on disk: a folder gets its final name only when complete, and is used only if its checksums agree.

checkpoints/checkpoint-<step>/
    rank-00000.safetensors ...  each rank's rows: model/NAME, optim.STATE/NAME, mask/NAME (one bit per weight), rng/...;
                                rank 0's holds the model's buffers too, whole: buffer/NAME
    state.json                  step, world size, which rank holds which rows, figures, scalars, identity, versions
    trainer_state.json          as transformers writes it
    SHA256SUMS                  checksums of all these files, for `sha256sum -c`

A checkpoint is written in `.checkpoint-<step>.tmp`. One whose checksums do not agree is renamed
`checkpoint-<step>.damaged`. All files are tensors or json, so loading one cannot execute code.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sparsity.common.files import remove_folder, sha256_of
from train.faults.stop import RunStopped

if TYPE_CHECKING:
    from train.distributed import World

FORMAT = 2
STATE = "state.json"
TRAINER_STATE = "trainer_state.json"
SUMS = "SHA256SUMS"
_NAME = re.compile(r"checkpoint-(\d+)")


def rank_file(rank: int) -> str:
    """Return the name of the file with a rank's shards."""
    return f"rank-{rank:05d}.safetensors"


def folder_of(root: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` steps."""
    return root / f"checkpoint-{step}"


def aside_of(root: Path, step: int) -> Path:
    """Return the temporary folder in which the checkpoint of `step` is written."""
    return root / f".checkpoint-{step}.tmp"


def step_of(folder: Path) -> int:
    """Return the step of a checkpoint's folder."""
    return int(folder.name.removeprefix("checkpoint-"))


def checkpoints(root: Path) -> list[Path]:
    """Return the checkpoints in `root`, newest first."""
    found = [path for path in root.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def damage(folder: Path, share: tuple[int, int] = (0, 1)) -> str | None:
    """Return a phrase that says what is wrong with a checkpoint, or None if nothing is.

    Args:
        folder: The checkpoint.
        share: (i, n) to check only every n-th file, starting with file i.
    """
    try:
        sums = read_sums((folder / SUMS).read_text(encoding="utf-8"))
        for name, expected in sorted(sums.items())[share[0] :: share[1]]:
            if sha256_of(folder / name) != expected:
                return f"{name} does not have the checksum it was written with"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read ({error.strerror})"
    except ValueError:
        return f"{SUMS} is garbled"
    return None


def read_sums(text: str) -> dict[str, str]:
    """Return {name: sha256} from a text in sha256sum's format.

    Raises:
        ValueError: The text is in another format or is cut off.
    """
    lines = text.split("\n")
    found = [re.fullmatch(r"([0-9a-f]{64})  ([\w.-]+)", line) for line in lines[:-1]]
    sums = {match[2]: match[1] for match in found if match}
    if lines[-1] or len(sums) != len(lines) - 1 or not {STATE, TRAINER_STATE, rank_file(0)} <= set(sums):
        raise ValueError("not a complete list of sums")
    return sums


def newest_whole(root: Path, world: World) -> tuple[Path | None, list[str]]:
    """Find the newest checkpoint whose checksums agree, and rename damaged ones.

    Collective: every rank calls it and checks a share of the files.

    Returns:
        The checkpoint, None if there is none, and a warning for each damaged one.

    Raises:
        RunStopped: There are checkpoints, but all are damaged.
    """
    warnings: list[str] = []
    for folder in world.on_main(checkpoints, root):
        found = world.problems(damage(folder, (world.rank, world.size)))
        if not found:
            return folder, warnings
        world.on_main(set_aside, folder)
        warnings.append(f"{folder} is damaged ({found[0]}): it is now {folder.name}.damaged and is not used")
    if warnings:
        raise RunStopped(
            f"No checkpoint is left to resume from: {'; '.join(warnings)}; set overwrite=true to start over."
        )
    return None, []


def set_aside(folder: Path) -> None:
    """Rename a damaged checkpoint, so that it is not used but its files can be inspected."""
    aside = folder.with_name(f"{folder.name}.damaged")
    remove_folder(aside)
    folder.rename(aside)


def remove_leftovers(root: Path) -> None:
    """Remove folders that a killed process left half-written or half-removed."""
    for pattern in (".checkpoint-*.tmp", ".checkpoint-*.removed"):
        for folder in root.glob(pattern):
            remove_folder(folder)


def remove_old(root: Path, keep: int, newest: int, keep_steps: Sequence[int] = ()) -> Sequence[Path]:
    """Remove old checkpoints, and return those removed.

    Args:
        root: The folder of the checkpoints.
        keep: How many of the last checkpoints to keep.
        newest: The step of the newest checkpoint; later ones are neither counted nor removed.
        keep_steps: Steps whose checkpoints always stay and are not counted.
    """
    assert keep >= 1
    found = [folder for folder in checkpoints(root) if step_of(folder) <= newest and step_of(folder) not in keep_steps]
    doomed = found[keep:]
    for folder in doomed:
        remove_folder(folder)
    return doomed
