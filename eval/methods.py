"""Ways to prune side by side: `python -m eval.methods runs=runs/SWEEP [format=json] [figure=FILE]`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from conf.cli import overrides_of, user_errors
from conf.compose import composed
from conf.schema import MethodsConfig
from eval.output import write_figure

EXAMPLES = """python -m eval.methods runs=runs/methods           a table with a line for each method, and methods.png
    ... figure=FILE                                 the figure elsewhere; null draws none
    ... format=json                                 the figures for a script
Keys: conf/methods.yaml, MethodsConfig in conf/schema/methods.py."""


def main(arguments: Sequence[str]) -> None:
    """Print and draw the comparison that the command line asks for."""
    with user_errors():
        overrides = overrides_of("eval.methods", "Compare ways to prune over seeds.", EXAMPLES, arguments)
        config: MethodsConfig = composed("methods", overrides)
        from eval.runs.methods.comparison import entries_of
        from eval.runs.methods.figure import draw_methods
        from eval.runs.methods.text import as_json, markdown
        from eval.runs.trials import read_trials

        entries = entries_of(read_trials(config.runs))
        write_figure(config.figure, lambda file: draw_methods(entries, file))
        print(json.dumps(as_json(entries), indent=2) if config.format == "json" else markdown(entries))


if __name__ == "__main__":
    main(sys.argv[1:])
