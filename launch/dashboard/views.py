"""The list of panels as objects of the library wandb-workspaces. Nothing here calls the wandb service."""

from __future__ import annotations

from typing import Any

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
from wandb_workspaces import expr

from eval.runs.page.panels import PANELS, SECTIONS, TABLE, Panel
from launch.dashboard.selection import Selection

COLUMNS = ["run:displayName", "run:state", "run:jobType", *(f"summary:{figure}" for figure in TABLE.values())]
"""The columns of wandb's table of runs: the figures of our table of a series."""
MAX_RUNS = 50
"""The number of runs drawn in a panel; wandb's default is 10."""
GRID_WIDTH, PANEL_WIDTH, PANEL_HEIGHT = 24, 12, 8


def build_view(kind: str, title: str, selection: Selection) -> Any:
    """Return a Workspace or a Report of the selected runs, not saved yet."""
    return workspace(title, selection) if kind == "workspace" else report(title, selection)


def workspace(title: str, selection: Selection) -> ws.Workspace:
    return ws.Workspace(
        entity=selection.entity,
        project=selection.project,
        name=title,
        sections=[
            ws.Section(
                name=section,
                panels=[wandb_panel(panel) for panel in PANELS if panel.section == section],
                is_open=True,
                layout_settings=ws.SectionLayoutSettings(columns=2, rows=3),
            )
            for section in SECTIONS
        ],
        settings=ws.WorkspaceSettings(max_runs=MAX_RUNS),
        runset_settings=ws.RunsetSettings(filters=run_filters(selection), pinned_columns=COLUMNS),
    )


def report(title: str, selection: Selection) -> wr.Report:
    blocks: list[Any] = [wr.P(f"{selection.words}. The same panels without an account: python -m eval.report.")]
    for number, section in enumerate(SECTIONS):
        panels = [wandb_panel(panel) for panel in PANELS if panel.section == section]
        for place, panel in enumerate(panels):
            row, column = divmod(place, GRID_WIDTH // PANEL_WIDTH)
            panel.layout = wr.Layout(x=column * PANEL_WIDTH, y=row * PANEL_HEIGHT, w=PANEL_WIDTH, h=PANEL_HEIGHT)
        # Without entity and project the runs are those of the report's own project, and no call to wandb is needed.
        runset = wr.Runset(
            name=selection.words,
            filters=run_filters(selection),
            pinned_columns=COLUMNS[:1],
            visible_columns=COLUMNS,
            column_order=COLUMNS,
            lock_columns=True,
        )
        blocks += [wr.H2(section), wr.PanelGrid(runsets=[runset], panels=panels, hide_run_sets=number > 0)]
    return wr.Report(entity=selection.entity, project=selection.project, title=title, width="fluid", blocks=blocks)


def wandb_panel(panel: Panel) -> Any:
    if panel.kind == "points":
        return wr.ScatterPlot(
            title=panel.title, x=wr.SummaryMetric(panel.x), y=wr.SummaryMetric(panel.y), log_x=panel.log_x or None
        )
    if panel.kind == "bars":
        return wr.BarPlot(title=panel.title, metrics=[panel.y], title_x=panel.y_label, max_runs_to_show=MAX_RUNS)
    keys: dict[str, Any] = {"y": [panel.y]}
    if panel.y.endswith("/*"):
        keys = {"metric_regex": f"^{panel.y.removesuffix('*')}.*"}
    return wr.LinePlot(
        title=panel.title,
        x=panel.x,
        title_x=panel.x_label,
        title_y=panel.y_label,
        log_y=panel.log_y or None,
        smoothing_type="none",
        max_runs_to_show=MAX_RUNS,
        **keys,
    )


def run_filters(selection: Selection) -> list[expr.FilterExpr]:
    if selection.group is not None:
        return [expr.Metric("Group") == selection.group]
    return [expr.Metric("ID").isin(list(selection.run_ids))]


def view_spec(view: Any) -> dict[str, Any]:
    """Return the JSON that `save` sends."""
    # The library has no public method for this.
    spec: dict[str, Any] = view._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)
    return spec
