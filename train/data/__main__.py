"""The command `python -m train.data experiment=NAME [key=value ...] [shard=i/n]`, which tokenizes a run's text."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence

from conf.cli import overrides_of, user_errors
from conf.compose import composed
from conf.schema import Config, tokenizer_of
from train.data.prepared import PreparedData, SplitCounts
from train.data.sets import check_sets, prepare_sets
from train.data.shards import Shard, ShardReport, parse_shard, prepare_shard
from train.plan.run import plan_run

EXAMPLES = """python -m train.data experiment=NAME [key=value ...]     prepare a run's text; rerun it to resume
    ... shard=2/8                                        an eighth of it, on machines that share data.cache_dir
Keys are those of python -m launch; data.num_workers is the number of processes, all cores if it is null."""


def main(arguments: Sequence[str]) -> None:
    """Prepare the tokens of a run, or one shard of them."""
    with user_errors():
        overrides = overrides_of("train.data", "Turn a run's text into tokens before it runs.", EXAMPLES, arguments)
        if not overrides:
            raise ValueError(
                "python -m train.data prepares the text of a run, but no run was given: give experiment=NAME, or data=text "
                "data.path=FILE, or --help."
            )
        own = [override.partition("=")[2] for override in overrides if override.startswith("shard=")]
        run = [override for override in overrides if not override.startswith("shard=")]
        shard = parse_shard(own[-1]) if own else Shard()
        config: Config = composed("train", run)
        plan = plan_run(config, 1)
        check_sets(config)
        report = prepare_shard(config.data, tokenizer_of(config), plan.model.vocab_size, plan.sequence_length, shard)
        sets = {} if report.prepared is None else prepare_sets(config, report.prepared)
        print(report_text(report, shard, run, sets))


def report_text(report: ShardReport, shard: Shard, arguments: Sequence[str], sets: Mapping[str, PreparedData]) -> str:
    """Return the report for the user: what was prepared and how to train on it, or how many parts are missing.

    Args:
        report: The state of the preparation.
        shard: The share that this command prepared.
        arguments: The run's overrides, to print the command that trains.
        sets: The held-out sets by name.
    """
    if report.prepared is None:
        return (
            f"shard {shard.number}/{shard.count} is done, but {report.num_waiting} of {report.num_parts} parts are not: "
            "run the other shards; the last one to finish combines them."
        )
    data = report.prepared
    return "\n".join(
        [
            *(_line(source.name, source.train, source.heldout) for source in data.sources),
            _line("all" if data.sources else "text", data.train, data.heldout),
            *(f"{name:<8}  {_size(data.heldout)}, only scored" for name, data in sets.items()),
            f"blocks    {data.num_blocks:,} of {data.sequence_length:,} tokens",
            f"folder    {data.folder}",
            f"train     python -m launch {' '.join(map(shlex.quote, arguments))}".rstrip(),
        ]
    )


def _line(name: str, train: SplitCounts, heldout: SplitCounts) -> str:
    return f"{name:<8}  {_size(train, 'to train on')}; {_size(heldout, 'held out')}"


def _size(counts: SplitCounts, words: str = "") -> str:
    size = f", {counts.num_bytes:,} bytes" if counts.num_bytes else ""
    return f"{' '.join(f'{counts.num_tokens:,} tokens {words}'.split())} ({counts.num_documents:,} documents{size})"


if __name__ == "__main__":
    main(sys.argv[1:])
