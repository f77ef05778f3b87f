"""The first act of a run that branches: another run's checkpoint becomes its own first one, and its records begin as that
run's did."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from conf.schema import Config
from sparsity.common.files import sync, write_atomically
from train.checkpoints import layout
from train.checkpoints.branch import check_branch, check_steps_alike
from train.checkpoints.resume import check_data
from train.plan.branch import BRANCH, Branch, branch_text, branch_words, read_branch
from train.plan.run import RunPlan
from train.record.directory import RunDirectory


def begin_branch(
    config: Config,
    plan: RunPlan,
    directory: RunDirectory,
    identity: dict[str, object],
    data_folder: str,
    tokenizer: str,
) -> Branch | None:
    """Make the folder of a run that branches, once; return where it branched, None for a run that does not.

    One process calls it, after the data is prepared and before the checkpoint to resume from is chosen.

    Args:
        config: The new run.
        plan: What follows from it.
        directory: Its folder.
        identity: What a step of it is.
        data_folder: Its prepared data.
        tokenizer: The prepared data's tokenizer.

    Raises:
        ValueError: The other run's checkpoint does not fit.
    """
    if config.branch_from is None:
        return None
    if directory.config.exists():
        return read_branch(directory.path)
    branch = check_branch(config, plan)
    check_steps_alike(config, branch, identity)
    source = layout.folder_of(Path(branch.run) / "checkpoints", branch.step)
    state = json.loads((source / layout.STATE).read_text(encoding="utf-8"))
    if not any(change.startswith(("data.", "tokenizer ")) for change in branch.changes):
        check_data(state["carried"]["data"], data_folder)
    check_same_tokenizer(config, state["carried"].get("tokenizer"), tokenizer)
    take_over_checkpoint(source, directory.checkpoints)
    take_over_records(Path(branch.run) / directory.metrics.name, directory.metrics, branch.step)
    write_atomically(directory.path / BRANCH, branch_text(branch))
    directory.begin(config, note=branch_words(branch))
    return branch


def check_same_tokenizer(config: Config, before: str | None, now: str) -> None:
    """Refuse other ids under the embeddings that are taken over, such as those of a tokenizer trained on other text.

    Raises:
        ValueError: It names the tokenizer of the other run.
    """
    if before is not None and Path(before).name != Path(now).name:
        raise ValueError(
            f"branch_from={config.branch_from} was trained with the tokenizer {before}, and this run would have another one "
            f"under the same embeddings: set tokenizer={before}."
        )


def take_over_checkpoint(source: Path, checkpoints: Path) -> Path:
    """Give the new run a checkpoint of the other one, by hard links where the file system has them; it appears whole."""
    aside, folder = layout.aside_of(checkpoints, layout.step_of(source)), checkpoints / source.name
    aside.mkdir(parents=True)
    for path in sorted(source.iterdir()):
        try:
            os.link(path, aside / path.name)
        except OSError:
            shutil.copyfile(path, aside / path.name)
    if (problem := layout.damage(aside)) is not None:
        shutil.rmtree(aside)
        raise ValueError(
            f"{source} was removed or damaged while it was taken over ({problem}): branch from another step."
        )
    aside.rename(folder)
    sync(checkpoints)
    return folder


def take_over_records(source: Path, metrics: Path, step: int) -> None:
    """Begin the new run's records with the other one's up to `step`; a line that is being written is left out."""
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True) if source.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    kept = [line for line in whole if json.loads(line)["train/global_step"] <= step]
    write_atomically(metrics, "".join(kept))
