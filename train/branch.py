"""The start of a branch: a run that takes over another run's checkpoint as its first one, and that run's metrics up to
there."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

from conf.schema import Config, DataConfig
from conf.schema.data import SourceConfig
from sparsity.common.files import publish_folder, write_atomically
from train.checkpoints import layout
from train.checkpoints.branch import check_branch, read_state
from train.checkpoints.resume import check_data
from train.data.mixture import MixedOrder
from train.data.tokenizer import load_tokenizer
from train.plan.branch import BRANCH, Branch, branch_text, branch_words, parse_branch, read_branch
from train.plan.run import RunPlan
from train.record.directory import RunDirectory
from train.record.read import CONFIG, read_config

NUM_TRIES = 3
"""The number of times that the newest checkpoint is looked for if a running run removes it while it is copied."""


class CheckpointGone(ValueError):
    """A checkpoint that was removed while it was being copied."""


def begin_branch(
    config: Config, plan: RunPlan, directory: RunDirectory, data_folder: str, tokenizer: str
) -> Branch | None:
    """Create the folder of a run that branches, if it does not exist yet, and return where the run branched.

    One process calls it, after the data is prepared and before the checkpoint to resume from is chosen. If it is
    interrupted, the next call starts over (`RunDirectory.claim`).

    Args:
        config: The configuration of the new run.
        plan: The plan made from it.
        directory: The folder of the new run.
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
    is_newest = parse_branch(config.branch_from)[1] is None
    for num_left in reversed(range(NUM_TRIES)):
        branch = check_branch(config, plan)
        try:
            return _take_over(config, branch, directory, data_folder, tokenizer)
        except CheckpointGone:
            if not (is_newest and num_left):
                raise
    raise AssertionError


def _take_over(config: Config, branch: Branch, directory: RunDirectory, data_folder: str, tokenizer: str) -> Branch:
    parent = Path(branch.run)
    source = layout.folder_of(parent / "checkpoints", branch.step)
    carried = read_state(source)["carried"]
    if not any(change.startswith(("data.", "tokenizer ")) for change in branch.changes):
        check_data(carried["data"], data_folder)
    check_same_tokenizer(config, carried.get("tokenizer"), tokenizer)
    branch = replace(branch, blocks=blocks_taken(parent, branch.step))
    # The record comes first and the config last, so that an interrupted start is recognized.
    write_atomically(directory.path / BRANCH, branch_text(branch))
    take_over_checkpoint(source, directory.checkpoints)
    take_over_records(parent / directory.metrics.name, directory.metrics, branch.step)
    directory.begin(config, note=branch_words(branch))
    return branch


def blocks_taken(run: Path, step: int) -> dict[str, int]:
    """Return the number of blocks that a run has taken from each source of text by a step, in the order of their numbers.

    Args:
        run: The folder of the run, which may itself be a branch.
        step: The step.
    """
    config, inner = read_config(run / CONFIG), read_branch(run)
    state = read_state(layout.folder_of(run / "checkpoints", step))
    taken, begin = ({}, 0) if inner is None else (dict(inner.blocks), inner.step)
    batch, sources = int(state["identity"]["batch_size"]), _shares(config.data)
    seed = config.trainer.seed if config.trainer.data_seed is None else config.trainer.data_seed
    order = MixedOrder(list(sources.values()), step * batch + 1, seed)
    counts = order.counts_before(step * batch) - order.counts_before(begin * batch)
    for name, count in zip(sources, counts.tolist(), strict=True):
        taken[name] = taken.get(name, 0) + count
    return taken


def _shares(data: DataConfig) -> dict[str, float]:
    """Return the weight of each source by name; a run's only source has the name that it would have in a mixture.

    The files are not looked at, because that run may have had others, or another working directory.
    """
    if data.source == "mixture":
        return {source.stem: source.weight for source in data.sources}
    if data.path is None and data.name is None:
        return {data.source: 1.0}
    return {SourceConfig(path=data.path, hub=None if data.path else data.name).stem: 1.0}


def check_same_tokenizer(config: Config, before: str | None, now: str) -> None:
    """Refuse another tokenizer than that of the embeddings which are taken over, such as one trained on other text.

    Args:
        config: The configuration of the new run.
        before: The folder of the other run's tokenizer; None if its checkpoint does not record it.
        now: The folder of the new run's tokenizer.

    Raises:
        ValueError: The tokenizers differ; the message names the other run's.
    """
    if before is not None and not _have_same_ids(Path(before), Path(now)):
        raise ValueError(
            f"branch_from={config.branch_from} was trained with the tokenizer {before}, but this run would use another "
            f"one with the same embeddings: set tokenizer={before}."
        )


def _have_same_ids(one: Path, other: Path) -> bool:
    # A folder's name is a hash of all its files, of which one changes when a tokenizer is loaded and saved again.
    if one.name == other.name:
        return True
    if not one.is_dir():
        return False
    return load_tokenizer(str(one)).get_vocab() == load_tokenizer(str(other)).get_vocab()


def take_over_checkpoint(source: Path, checkpoints: Path) -> Path:
    """Copy a checkpoint of the other run into the new run, by hard links if possible; it appears only when complete.

    Checkpoints are never written in place, so both runs can share the files.

    Raises:
        CheckpointGone: The other run removed it in the meantime.
        ValueError: The checkpoint is damaged.
    """
    aside, folder = layout.aside_of(checkpoints, layout.step_of(source)), checkpoints / source.name
    aside.mkdir(parents=True)
    try:
        for path in sorted(source.iterdir()):
            try:
                os.link(path, aside / path.name)
            except OSError:
                # The folders are on two file systems, or the files belong to another user.
                shutil.copyfile(path, aside / path.name)
        problem = layout.damage(aside)
    except FileNotFoundError:
        problem = "it is incomplete"
    if problem is not None:
        shutil.rmtree(aside)
        if not (source / layout.SUMS).exists():
            raise CheckpointGone(f"{source} was removed while it was being copied: branch from another step.")
        raise ValueError(f"{source} is damaged ({problem}): branch from another step.")
    publish_folder(aside, folder)
    return folder


def take_over_records(source: Path, metrics: Path, step: int) -> None:
    """Start the new run's metrics with those of the other run up to `step`; leave out a last line that is cut off.

    Args:
        source: The metrics.jsonl of the other run.
        metrics: The metrics.jsonl to write.
        step: The last step to take over.

    Raises:
        ValueError: A line is not a record.
    """
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True) if source.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    try:
        kept = [line for line in whole if json.loads(line)["train/global_step"] <= step]
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{source} has a line that is not a record: repair or remove the line.") from None
    write_atomically(metrics, "".join(kept))
