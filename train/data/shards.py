"""Preparing text separately from training: all of it, or one of several shares on machines that share a cache."""

from __future__ import annotations

import re
from dataclasses import dataclass

from conf.schema import DataConfig
from train.data.files import lock
from train.data.folders import TokenFolder, pack_all
from train.data.index import is_complete
from train.data.pack import is_done
from train.data.pipeline import plan_preparation, prepare
from train.data.prepared import PreparedData


@dataclass(frozen=True)
class Shard:
    """A share of the text: `number` of `count`, counted from 1."""

    number: int = 1
    count: int = 1


@dataclass(frozen=True)
class ShardReport:
    """The state of the preparation after one share is done."""

    num_parts: int
    """The number of parts of all shares."""
    num_waiting: int
    """The number of parts of other shares that are not done yet."""
    prepared: PreparedData | None
    """The prepared data; None while parts are missing."""


def parse_shard(text: str) -> Shard:
    """Return the shard that `i/n` names.

    Raises:
        ValueError: The text does not name one.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    number, count = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= number <= count:
        raise ValueError(f"shard={text} is not a share of the text: give shard=1/4 to shard=4/4 on four machines.")
    return Shard(number, count)


def prepare_shard(
    config: DataConfig, tokenizer: str | None, vocab_size: int, sequence_length: int, shard: Shard
) -> ShardReport:
    """Tokenize a share of the parts of each source; the process that finishes the last part writes the index.

    Parts that are already done are kept, so that the same command resumes.

    Args:
        config: The text to read, and how to store it.
        tokenizer: As in `train.data.pipeline.prepare`.
        vocab_size: The model's vocabulary size.
        sequence_length: The number of tokens in a block.
        shard: The share.

    Raises:
        ValueError: The input cannot be used.
    """
    num_parts = num_waiting = 0
    if shard.count > 1:
        plan = plan_preparation(config, tokenizer, vocab_size, config.heldout_share, sequence_length)
        for stream in plan.streams:
            parts, waiting = _share(stream, shard, config.num_workers)
            num_parts += parts
            num_waiting += waiting
    done = num_waiting == 0
    prepared = prepare(config, tokenizer, vocab_size, sequence_length) if done else None
    return ShardReport(num_parts, num_waiting, prepared)


def _share(stream: TokenFolder, shard: Shard, num_workers: int | None) -> tuple[int, int]:
    """Tokenize this share; return (parts of the source, parts not done yet), both 0 for tokens that are read in place."""
    if stream.jobs is None or stream.finish is None:
        return 0, 0
    jobs = stream.jobs()
    if is_complete(stream.folder):
        return len(jobs), 0
    stream.folder.mkdir(parents=True, exist_ok=True)
    # The folder's lock is not needed: each part is written by one share only, and appears when it is complete.
    pack_all(jobs[shard.number - 1 :: shard.count], num_workers)
    waiting = sum(not is_done(job) for job in jobs)
    if not waiting:
        with lock(stream.folder):
            if not is_complete(stream.folder):
                stream.finish(jobs)
    return len(jobs), waiting
