"""The command line of `launch.plan`, split: the plan's own keys go to conf/plan.yaml, a run's keys to conf/train.yaml."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from conf.compose import composed, composition_sentence, prepared
from conf.schema import Config, PlanConfig


@dataclass(frozen=True)
class Request:
    """The plan's own keys, and the runs to plan."""

    plan: PlanConfig
    runs: list[Config]
    is_series: bool


def read_request(arguments: Sequence[str]) -> Request:
    """Compose the plan and its runs: one run if experiment= or model= is given, otherwise those of the series.

    Raises:
        ValueError: The arguments are invalid, ask for a sweep, or name no run.
    """
    arguments = prepared("plan", arguments)
    own_keys = {field.name for field in fields(PlanConfig)}
    own: list[str] = []
    run: list[str] = []
    try:
        parsed = OverridesParser.create().parse_overrides(list(arguments))
    except HydraException as error:
        raise ValueError(composition_sentence(error)) from error
    for text, override in zip(arguments, parsed, strict=True):
        if override.is_sweep_override():
            raise ValueError(
                f"{text} asks for several runs: the plan takes one at a time, or the table of series=[...]."
            )
        (own if override.key_or_group in own_keys else run).append(text)
    names_a_run = any(override.key_or_group in ("experiment", "model") for override in parsed)
    plan: PlanConfig = composed("plan", own)
    if names_a_run:
        return Request(plan, [composed("train", run)], is_series=False)
    if not plan.series:
        raise ValueError("series=[] names no experiment: give a list of them, or experiment=NAME.")
    configs = [composed("train", [f"experiment={name}", *run]) for name in plan.series]
    return Request(plan, configs, is_series=True)
