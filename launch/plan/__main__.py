"""The command `python -m launch.plan`: the table of a series of runs, or with experiment=NAME the forecast of one run."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from conf.cli import overrides_of, user_errors
from eval.output import write_figure
from launch.plan.request import read_request
from train.checkpoints.branch import with_past
from train.model.initial_check import check_start
from train.plan.figure import draw_density
from train.plan.forecast import forecast
from train.plan.run import plan_run
from train.plan.series import table_row
from train.plan.text import run_text, series_text
from train.record.read import measured_loss

EXAMPLES = """python -m launch.plan [series=[NAME,...]] [format=json]          the table of the series
python -m launch.plan experiment=NAME [devices=64] [device=H100] [mfu=0.4] [key=value ...]
Keys of the plan itself are in conf/plan.yaml; all others are the run's, as for python -m launch."""


def main(arguments: Sequence[str]) -> None:
    """Print the plan of a run, or of the published series, and draw its schedule."""
    with user_errors():
        overrides = overrides_of("launch.plan", "Print what a run will cost before it runs.", EXAMPLES, arguments)
        request = read_request(overrides)
        plan = request.plan
        planned = [(config, plan_run(config, plan.devices)) for config in request.runs]
        for config, run_plan in planned:
            check_start(config, run_plan, overrides)
        planned = [(config, with_past(config, run_plan)) for config, run_plan in planned]
        if request.is_series:
            answer = [{**table_row(*run), **measured_loss(run[1])} for run in planned]
            text = "" if plan.format == "json" else series_text(answer)
        else:
            one = {**forecast(*planned[0], plan), **measured_loss(planned[0][1])}
            text = "" if plan.format == "json" else run_text(one)
        print(json.dumps(answer if request.is_series else one, indent=2) if plan.format == "json" else text)
        figure = ("" if request.is_series else "plan.png") if plan.figure == "auto" else plan.figure
        write_figure(figure, lambda file: draw_density([run for _, run in planned], file))


if __name__ == "__main__":
    main(sys.argv[1:])
