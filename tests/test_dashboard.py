"""The panels as wandb objects: their JSON, built without the service, and what is refused at the start."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from eval.runs.page.panels import PANELS, SECTIONS, TABLE
from launch.dashboard.__main__ import main
from tests.panel_runs import write_run


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """Remove the account, and block the service."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the service was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


def spec_of(capsys, *arguments: str) -> dict[str, Any]:
    main([*arguments, "dry_run=true"])
    return json.loads(capsys.readouterr().out)


def error_of(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    said = capsys.readouterr()
    assert stop.value.code == 2
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    return said.err


def parts(spec: Any, key: str) -> Iterator[Any]:
    """Yield every value of `key`, at any depth."""
    if isinstance(spec, dict):
        for name, value in spec.items():
            if name == key:
                yield value
            yield from parts(value, key)
    elif isinstance(spec, list):
        for value in spec:
            yield from parts(value, key)


def shown(config: dict[str, Any]) -> tuple[str | None, str]:
    """Return the (x, y) of a panel's config, as keys of our records."""
    x = config.get("xAxis")
    y = config.get("yAxis") or config.get("metricRegex") or config["metrics"][0]
    return x and x.removeprefix("summary:"), y.removeprefix("summary:")


@pytest.mark.parametrize("kind", ["workspace", "report"])
def test_both_kinds_hold_every_panel_of_the_list_with_its_axes_in_order(capsys, kind):
    spec = spec_of(capsys, "sweep_name=levels", f"kind={kind}")
    configs = [config for config in parts(spec, "config") if "chartTitle" in config]
    assert [config["chartTitle"] for config in configs] == [panel.title for panel in PANELS]
    for panel, config in zip(PANELS, configs, strict=True):
        x, y = shown(config)
        assert x == (None if panel.kind == "bars" else panel.x)
        assert re.fullmatch(y, "layer_density/lm_head.weight") if panel.kind == "layers" else y == panel.y
    text = json.dumps(spec)
    assert all(f'"{section}"' in text for section in SECTIONS)


@pytest.mark.parametrize("kind", ["workspace", "report"])
def test_the_table_of_runs_has_the_series_columns(capsys, kind):
    spec = spec_of(capsys, "sweep_name=levels", f"kind={kind}")
    order = next(parts(spec, "columnOrder"))
    assert order == ["run:displayName", "run:state", "run:jobType", *(f"summary:{key}" for key in TABLE.values())]


@pytest.mark.parametrize("kind", ["workspace", "report"])
def test_a_sweep_is_its_group(capsys, kind):
    spec = spec_of(capsys, "sweep_name=my levels", f"kind={kind}", "entity=team", "project=other")
    for filters in parts(spec, "filters"):
        if isinstance(filters, list):
            assert [(f["key"]["name"], f["op"], f["value"]) for f in filters] == [("group", "=", "my levels")]
    assert "team" in json.dumps(spec)
    assert "other" in json.dumps(spec)
    assert spec["displayName"] == "my levels"


def run_with_id(folder, run_id, project="sparsellm"):
    write_run(folder, steps=2)
    (folder / "wandb").mkdir()
    (folder / "wandb" / "id.txt").write_text(run_id + "\n")
    config = (folder / "config.yaml").read_text()
    assert "project: sparsellm" in config
    (folder / "config.yaml").write_text(config.replace("project: sparsellm", f"project: {project}"))
    return folder


def test_folders_are_shown_by_the_ids_and_in_the_project_that_they_were_logged_under(capsys, tmp_path):
    run_with_id(tmp_path / "sweep" / "a", "aaaa1111", "mine")
    run_with_id(tmp_path / "sweep" / "b", "bbbb2222", "mine")
    spec = spec_of(capsys, f"runs={tmp_path}/sweep")
    (filters,) = [found for found in parts(spec, "filters") if isinstance(found, list)]
    assert [(f["key"]["name"], f["op"], f["value"]) for f in filters] == [("name", "IN", ["aaaa1111", "bbbb2222"])]
    assert spec["project"] == "mine"


def test_folders_of_two_projects_are_refused_unless_one_is_given(capsys, tmp_path):
    run_with_id(tmp_path / "a", "aaaa1111", "mine")
    run_with_id(tmp_path / "b", "bbbb2222", "yours")
    assert "set project= for all" in error_of(capsys, f"runs={tmp_path}", "dry_run=true")
    assert spec_of(capsys, f"runs={tmp_path}", "project=ours")["project"] == "ours"


def test_a_run_that_was_not_logged_to_wandb_is_named(capsys, tmp_path):
    write_run(tmp_path / "quiet", steps=2)
    said = error_of(capsys, f"runs={tmp_path}/quiet", "dry_run=true")
    assert "quiet has no wandb run" in said
    assert "python -m eval.report" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sweep_name=levels"], "needs a wandb account: run `wandb login` or set WANDB_API_KEY"),
        (["dry_run=true"], "needs sweep_name="),
        (["sweep_name=levels", "runs=runs/levels"], "both say which runs"),
        (["sweep_name='a=b'", "dry_run=true"], "give the runs' folders with runs="),
        (["sweep_name=levels", "kind=page"], "choose one of workspace, report"),
        (["sweep_nam=levels"], "did you mean sweep_name?"),
        (["runs=missing", "dry_run=true"], "runs=missing does not exist"),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence_before_anything_is_done(capsys, arguments, words):
    assert words in error_of(capsys, *arguments)


def test_what_wandb_refuses_is_one_sentence(capsys, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(
        "launch.dashboard.views.ws.Workspace.save", lambda _: (_ for _ in ()).throw(RuntimeError("no room"))
    )
    said = error_of(capsys, "sweep_name=levels", "entity=team")
    assert "wandb did not accept the dashboard for team/sparsellm (no room)" in said
