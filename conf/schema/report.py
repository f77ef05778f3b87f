"""The keys of two commands that show runs side by side: `python -m eval.report` and `python -m launch.dashboard`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.schema.checks import check, check_choice, names_of


@dataclass
class ReportConfig:
    """The keys of `python -m eval.report`, which writes one HTML page, and its figures as PNGs in a folder of the same name."""

    runs: Any = field(default_factory=list)
    """Run folders, folders of runs, or patterns of them, finished or not: one or a list."""
    page: str = "report.html"
    """The HTML file to write."""
    title: str | None = None
    """Title of the page; null takes the name of the folder that holds the runs."""
    loss: str = "heldout_loss"
    """The figure of summary.json that is drawn against average parameters and that the law is fitted to."""
    form: str = "auto"
    """Form of the law, as in `python -m eval.scaling_law`; auto takes the first of nd, n, power that the runs identify."""

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
    """The keys of `python -m launch.dashboard`: a wandb workspace or report for the runs of a sweep or of run folders."""

    sweep_name: str | None = None
    """The wandb group of the runs."""
    runs: Any = field(default_factory=list)
    """Run folders, folders of runs, or patterns of them, whose wandb runs are shown: one or a list."""
    kind: str = "workspace"
    """`workspace`, a live view of the project, or `report`, a page to share."""
    title: str | None = None
    """Title of the dashboard; null takes the sweep's name, or the runs'."""
    project: str | None = None
    """The wandb project; null takes that of the run folders, or sparsellm."""
    entity: str | None = None
    """The wandb entity; null takes that of the run folders, or the account's default."""
    dry_run: bool = False
    """Print the dashboard's JSON only; this needs no account."""

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
