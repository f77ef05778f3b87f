"""Sparse runs beside their dense twins: `python -m eval.pairs runs=runs/SWEEP [format=json] [figure=FILE]`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from conf.cli import user_errors
from conf.compose import composed
from conf.schema import PairsConfig


def main(arguments: Sequence[str]) -> None:
    if any(argument in ("-h", "--help") for argument in arguments):
        print(__doc__)
        return
    with user_errors():
        config: PairsConfig = composed("pairs", arguments)
        from eval.runs.pairs.comparison import compare, read_runs
        from eval.runs.pairs.figure import draw_pairs
        from eval.runs.pairs.text import as_json, markdown

        runs = read_runs(config.runs)
        comparisons = compare(runs)
        if config.figure:
            Path(config.figure).parent.mkdir(parents=True, exist_ok=True)
            draw_pairs(runs, comparisons, Path(config.figure))
            print(f"wrote {config.figure}", file=sys.stderr)
        print(json.dumps(as_json(comparisons), indent=2) if config.format == "json" else markdown(comparisons))


if __name__ == "__main__":
    main(sys.argv[1:])
