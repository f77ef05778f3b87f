"""Runs side by side: the page of `python -m eval.report`, the wandb dashboard of `python -m launch.dashboard`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.schema.checks import check, check_choice, names_of


@dataclass
class ReportConfig:
    """One HTML page, and each of its figures as a PNG in a folder beside it, named like it."""

    runs: Any = field(default_factory=list)
    """Run folders, folders of runs, or patterns of them, finished or not: one, or a list."""
    page: str = "report.html"
    title: str | None = None
    """Null takes the name of the folder that holds the runs."""
    loss: str = "heldout_loss"
    """The figure of summary.json that is set against average parameters, and that the law is fitted to."""
    form: str = "auto"
    """The law drawn through the points, as in `python -m eval.scaling_law`; auto: the first of nd, n, power they tell."""

    def __post_init__(self) -> None:
        self.runs = names_of(self.runs)
        check(
            Path(self.page).suffix in (".html", ".htm"),
            f"page={self.page} is not an HTML file: give a name that ends in .html.",
        )
        check_choice("loss", self.loss, ("heldout_loss", "final_train_loss"))
        check_choice("form", self.form, ("auto", "nd", "n", "power"))


@dataclass
class DashboardConfig:
    """A workspace or a report of wandb, over the runs of a sweep or those of some run folders."""

    sweep_name: str | None = None
    """The wandb group of the runs."""
    runs: Any = field(default_factory=list)
    """Run folders, folders of runs, or patterns of them, whose wandb runs are shown: one, or a list."""
    kind: str = "workspace"
    """A workspace is a live view of the project, a report a page to share."""
    title: str | None = None
    project: str | None = None
    """Where it is null that of the run folders, else sparsellm."""
    entity: str | None = None
    """Where it is null that of the run folders, else the account's own."""
    dry_run: bool = False
    """Print the dashboard's JSON, and ask for no account."""

    def __post_init__(self) -> None:
        self.runs = names_of(self.runs, least=0)
        check(
            self.sweep_name is not None or bool(self.runs),
            "a dashboard needs sweep_name=, the group of its wandb runs, or runs=, their folders.",
        )
        check(
            self.sweep_name is None or not self.runs,
            f"sweep_name={self.sweep_name} and runs={','.join(self.runs)} both say which runs: give one of them.",
        )
        check_choice("kind", self.kind, ("workspace", "report"))
