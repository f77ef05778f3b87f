"""`python -m launch --help` names and explains every group, choice and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.help import choice_lines, help_text, key_lines
from tests.commands import ROOT, run_command
from tests.test_conf import GROUPS


def test_the_overview_names_every_group_and_choice():
    words = help_text()
    for group, choice in GROUPS:
        line = next(line for line in words.splitlines() if line.split()[:1] == [group])
        assert choice in line.replace(",", " ").split()
    assert "hydra/launcher" in words
    assert "python -m launch -m" in words


@pytest.mark.parametrize("group", sorted({group for group, _ in GROUPS} | {"hydra/launcher"}))
def test_every_choice_says_what_it_is(group):
    for line in choice_lines(ROOT / "conf" / group):
        assert len(line.split(None, 1)[1]) > 12, line


def test_defaults_are_written_as_yaml_has_them():
    words = help_text("launch")
    for key in ("num_processes = null", "max_restarts = 0", "num_replicas = 1"):
        assert f"  {key} " in words
    assert "push_to_hub = false " in help_text("card")
    assert "rms_norm_eps = 1e-05" in help_text("model")


def test_keys_are_explained_by_their_classes_own_words():
    from conf.schema import LaunchConfig

    assert all(len(line) > 60 for line in key_lines(LaunchConfig)), key_lines(LaunchConfig)


def test_the_command_prints_a_group_and_refuses_another(tmp_path: Path):
    assert "twin_pairs" in run_command(["launch", "--help", "sweep"], cwd=tmp_path).stdout
    done = run_command(["launch", "--help", "sweeps"], cwd=tmp_path)
    assert done.returncode == 2
    assert "there is no such group; choose one of data" in done.stderr
