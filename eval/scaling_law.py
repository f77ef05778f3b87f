"""The command that fits the scaling law to finished runs: `python -m eval.scaling_law runs=runs/SWEEP [format=json]`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from conf.cli import overrides_of, user_errors
from conf.compose import composed
from conf.schema import ScalingLawConfig
from eval.output import write_figure

EXAMPLES = """python -m eval.scaling_law runs=runs/SWEEP                     fit L = E + A / N^alpha + B / D^beta
python -m eval.scaling_law runs=[runs/a,runs/b*,points.csv] form=n  runs on equally many tokens: L = E + A / N^alpha
    ... predict.experiment=NAME [predict.overrides=[sparsity.target=0.6]]    the loss of a planned run
    ... predict.avg_linear_params=4.5e8 predict.total_tokens=2e11            the same, from numbers
    ... target_loss=2.5                                                      the cheapest N-bar and D
N is the average of the linear parameters over the run, and beside it the final, non-zero ones. A CSV file has columns
avg_linear_params, final_linear_params (or nonzero_linear_params), total_tokens, loss, sparsity. Keys: conf/scaling_law.yaml,
ScalingLawConfig in conf/schema/law.py."""


def main(arguments: Sequence[str]) -> None:
    """Fit the law to finished runs, print it and draw it."""
    with user_errors():
        overrides = overrides_of("eval.scaling_law", "Fit the scaling law of finished runs.", EXAMPLES, arguments)
        config: ScalingLawConfig = composed("scaling_law", overrides)
        from eval.runs.law.figure import draw_laws
        from eval.runs.law.points import read_points
        from eval.runs.law.report import report
        from eval.runs.law.text import report_text

        points = read_points(config.runs, config.loss)
        figures, fits = report(config, points)
        write_figure(config.figure, lambda file: draw_laws(points, figures, fits, file))
        print(json.dumps(figures, indent=2) if config.format == "json" else report_text(figures))


if __name__ == "__main__":
    main(sys.argv[1:])
