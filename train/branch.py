"""The start of a branch: a run that takes over another run's checkpoint as its first one, and that run's metrics up to
there."""

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
    """Create the folder of a run that branches, if it does not exist yet, and return where the run branched.

    One process calls it, after the data is prepared and before the checkpoint to resume from is chosen.

    Args:
        config: The configuration of the new run.
        plan: The plan made from it.
        directory: The folder of the new run.
        identity: Settings that must match for a checkpoint to be resumed.
        data_folder: The folder of its prepared data.
        tokenizer: The folder of that data's tokenizer.

    Returns:
        The branch; None for a run that does not branch.

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
    """Refuse another tokenizer than that of the embeddings which are taken over, such as one trained on other text.

    Args:
        config: The configuration of the new run.
        before: The folder of the other run's tokenizer; None if its checkpoint does not record it.
        now: The folder of the new run's tokenizer.

    Raises:
        ValueError: The tokenizers differ; the message names the other run's.
    """
    if before is not None and Path(before).name != Path(now).name:
        raise ValueError(
            f"branch_from={config.branch_from} was trained with the tokenizer {before}, and this run would have another one "
            f"under the same embeddings: set tokenizer={before}."
        )


def take_over_checkpoint(source: Path, checkpoints: Path) -> Path:
    """Copy a checkpoint of the other run into the new run, by hard links if possible; it appears only when complete.

    Raises:
        ValueError: The checkpoint was removed or damaged in the meantime.
    """
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
    """Start the new run's metrics with those of the other run up to `step`; leave out a last line that is cut off.

    Args:
        source: The metrics.jsonl of the other run.
        metrics: The metrics.jsonl to write.
        step: The last step to take over.
    """
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True) if source.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    kept = [line for line in whole if json.loads(line)["train/global_step"] <= step]
    write_atomically(metrics, "".join(kept))
