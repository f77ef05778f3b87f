"""The command that compares sparse runs with their dense twins: `python -m eval.pairs runs=runs/SWEEP [format=json]`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from conf.cli import overrides_of, user_errors
from conf.compose import composed
from conf.schema import PairsConfig
from eval.output import write_figure

EXAMPLES = """python -m eval.pairs runs=runs/SWEEP                   a table, and its figure pairs.png
    ... figure=FILE                                    the figure elsewhere; null draws none
    ... format=json                                    the figures for a script
Keys: conf/pairs.yaml, PairsConfig in conf/schema/pairs.py."""


def main(arguments: Sequence[str]) -> None:
    """Compare the pairs among finished runs, print the comparison and draw it."""
    with user_errors():
        overrides = overrides_of("eval.pairs", "Compare sparse runs with their dense twins.", EXAMPLES, arguments)
        config: PairsConfig = composed("pairs", overrides)
        from eval.runs.pairs.comparison import compare
        from eval.runs.pairs.figure import draw_pairs
        from eval.runs.pairs.text import as_json, markdown
        from eval.runs.trials import read_trials

        runs = read_trials(config.runs)
        comparisons = compare(runs)
        write_figure(config.figure, lambda file: draw_pairs(runs, comparisons, file))
        print(json.dumps(as_json(comparisons), indent=2) if config.format == "json" else markdown(comparisons))


if __name__ == "__main__":
    main(sys.argv[1:])
