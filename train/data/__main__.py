"""The command `python -m train.data experiment=NAME [key=value ...] [shard=i/n]`, which tokenizes a run's text."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from conf.cli import user_errors
from conf.compose import composed
from conf.schema import Config, tokenizer_of
from train.data.pipeline import SplitCounts
from train.data.shards import Shard, ShardReport, parse_shard, prepare_shard
from train.plan.run import plan_run

USAGE = """python -m train.data experiment=NAME [key=value ...]          prepare a run's text; the same command resumes
python -m train.data experiment=NAME [key=value ...] shard=2/8   an eighth of it, on machines that share data.cache_dir
Keys are those of python -m launch; data.num_workers is the number of processes, all cores if it is null."""


def main(arguments: Sequence[str]) -> None:
    if any(argument in ("-h", "--help") for argument in arguments):
        print(USAGE)
        return
    with user_errors():
        own = [argument.partition("=")[2] for argument in arguments if argument.startswith("shard=")]
        run = [argument for argument in arguments if not argument.startswith("shard=")]
        shard = parse_shard(own[-1]) if own else Shard()
        config: Config = composed("train", run)
        plan = plan_run(config, 1)
        report = prepare_shard(config.data, tokenizer_of(config), plan.model.vocab_size, plan.sequence_length, shard)
        print(report_text(report, shard, run))


def report_text(report: ShardReport, shard: Shard, arguments: Sequence[str]) -> str:
    """Return the report for the user: what was prepared and how to train on it, or how many parts are missing.

    Args:
        report: The state of the preparation.
        shard: The share that this command prepared.
        arguments: The run's overrides, to print the command that trains.
    """
    if report.prepared is None:
        return (
            f"shard {shard.number}/{shard.count} is done, {report.num_waiting} of {report.num_parts} parts are not: run the "
            "other shards, the last one to end puts them together."
        )
    data = report.prepared
    return "\n".join(
        [
            *(_line(source.name, source.train, source.heldout) for source in data.sources),
            _line("all" if data.sources else "text", data.train, data.heldout),
            f"blocks    {data.num_blocks:,} of {data.sequence_length:,} tokens",
            f"folder    {data.folder}",
            f"train     python -m launch {' '.join(map(shlex.quote, arguments))}".rstrip(),
        ]
    )


def _line(name: str, train: SplitCounts, heldout: SplitCounts) -> str:
    sides = []
    for words, counts in (("to train on", train), ("held out", heldout)):
        size = f", {counts.num_bytes:,} bytes" if counts.num_bytes else ""
        sides.append(f"{counts.num_tokens:,} tokens {words} ({counts.num_documents:,} documents{size})")
    return f"{name:<8}  {'; '.join(sides)}"


if __name__ == "__main__":
    main(sys.argv[1:])
