"""`python -m launch.plan`: the series' table, or with experiment=NAME what that run will be."""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from hydra.errors import HydraException

from conf.cli import user_errors
from conf.schema import Config, PlanConfig
from launch.plan.figure import draw_density
from launch.plan.forecast import forecast
from launch.plan.request import read_request
from launch.plan.series import table_row
from launch.plan.text import run_text, series_text
from train.plan import plan_run

USAGE = """python -m launch.plan [series=[NAME,...]] [format=json]          the table of the series
python -m launch.plan experiment=NAME [devices=64] [device_memory=141GB] [mfu=0.4] [key=value ...]
Keys of the plan itself are in conf/plan.yaml; all others are the run's, as for python -m launch."""


def main(arguments: Sequence[str]) -> None:
    if any(argument in ("-h", "--help") for argument in arguments):
        print(USAGE)
        return
    with user_errors():
        try:
            request = read_request(arguments)
        except (HydraException, OSError) as error:
            raise ValueError(composition_sentence(error)) from error
        plan = request.plan
        planned = [(config, plan_run(config, plan.devices)) for config in request.runs]
        if request.is_series:
            answer = [table_row(*run) for run in planned]
            text = "" if plan.format == "json" else series_text(answer)
        else:
            one = forecast(*planned[0], plan)
            text = "" if plan.format == "json" else run_text(one)
        print(json.dumps(answer if request.is_series else one, indent=2) if plan.format == "json" else text)
        figure = ("" if request.is_series else "plan.png") if plan.figure == "auto" else plan.figure
        if figure:
            Path(figure).parent.mkdir(parents=True, exist_ok=True)
            draw_density([run for _, run in planned], Path(figure))
            print(f"wrote {figure}", file=sys.stderr)


def composition_sentence(error: Exception) -> str:
    """Hydra's message in one line, without its search path and advice; a mistyped key gets the nearest one there is."""
    cause = error
    while isinstance(cause.__cause__, Exception):
        cause = cause.__cause__
    lines = [line.strip() for part in (error, cause) for line in str(part).split("Config search path")[0].splitlines()]
    idle = ("See https", "full_key", "object_type", "reference_type", "To append")
    said = " ".join(dict.fromkeys(line for line in lines if line and not line.startswith(idle)))
    unknown = re.search(r"Could not override '([\w.]+)'|Key '(\w+)' not in", said)
    if unknown is None:
        return said
    key = (unknown[1] or unknown[2]).split(".")[-1]
    paths = {path.split(".")[-1]: path for path in [*key_paths(Config), *key_paths(PlanConfig)]}
    near = difflib.get_close_matches(key, paths, n=1)
    return said.rstrip(".") + (f": did you mean {paths[near[0]]}?" if near else ": conf/ lists the keys there are.")


def key_paths(schema: Any, prefix: str = "") -> Iterator[str]:
    """The dotted names of a config dataclass's keys, at any depth, the outer ones last."""
    for key, kind in get_type_hints(schema).items():
        if is_dataclass(kind):
            yield from key_paths(kind, f"{prefix}{key}.")
        yield f"{prefix}{key}"


if __name__ == "__main__":
    main(sys.argv[1:])
