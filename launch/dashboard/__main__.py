"""The command `python -m launch.dashboard sweep_name=SWEEP [kind=report] [dry_run=true]`: runs side by side in wandb."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from conf.cli import overrides_of, user_errors
from conf.compose import composed
from conf.schema import DashboardConfig
from launch.dashboard.selection import Selection, select
from train.record.wandb_key import has_wandb_key

EXAMPLES = """python -m launch.dashboard sweep_name=SWEEP                 a workspace over the wandb runs of a sweep
python -m launch.dashboard runs=runs/SWEEP kind=report      a report, over the runs of some folders
    ... entity=TEAM project=sparsellm title=...
    ... dry_run=true                                        prints its JSON; needs no account
Runs that were logged offline are uploaded first: wandb sync runs/SWEEP/*/wandb/offline-run-*. The same panels without an
account: python -m eval.report runs=runs/SWEEP. Keys: conf/dashboard.yaml, DashboardConfig in conf/schema/report.py."""


def main(arguments: Sequence[str]) -> None:
    with user_errors():
        overrides = overrides_of("launch.dashboard", "Show runs side by side in wandb.", EXAMPLES, arguments)
        config: DashboardConfig = composed("dashboard", overrides)
        check_possible(config)
        selection = select(config)
        from launch.dashboard.views import build_view, view_spec

        title = config.title or config.sweep_name or selection.words
        if config.dry_run:
            print(json.dumps(view_spec(build_view(config.kind, title, selection)), indent=2))
            return
        print(save(config, title, selection))


def check_possible(config: DashboardConfig) -> None:
    """Check that the library is installed and, unless it is a dry run, that a wandb key is configured.

    Raises:
        ValueError: One of them is missing.
    """
    if find_spec("wandb_workspaces") is None:
        raise ValueError("launch.dashboard needs the library wandb-workspaces: pip install 'sparsellm[dashboard]'.")
    if not config.dry_run and not has_wandb_key():
        raise ValueError(
            "launch.dashboard needs a wandb account: run `wandb login` or set WANDB_API_KEY; dry_run=true prints the "
            "dashboard without one, and python -m eval.report runs=FOLDERS draws the same panels."
        )


def save(config: DashboardConfig, title: str, selection: Selection) -> str:
    """Create the dashboard and return its address.

    Raises:
        ValueError: wandb refused it.
    """
    import wandb

    from launch.dashboard.views import build_view

    try:
        if not selection.entity:
            selection = replace(selection, entity=str(wandb.Api().default_entity))
        view: Any = build_view(config.kind, title, selection)
        view.save()
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
        raise ValueError(
            f"wandb did not take the dashboard for {selection.entity or 'your account'}/{selection.project} ({reason}): "
            "check entity=, project= and the connection; dry_run=true prints it."
        ) from None
    return str(view.url)


if __name__ == "__main__":
    main(sys.argv[1:])
