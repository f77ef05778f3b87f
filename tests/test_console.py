"""`sparsellm`: one name for the commands, with help and completion, without torch."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.completion import completions
from launch.console import COMMANDS, completion_script
from tests.commands import ROOT, quiet_environment, run_command

SCRIPT = "from launch.console import main; main()"


def sparsellm(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run the same code as the console script."""
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], cwd=cwd, env=quiet_environment({}), capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip


def test_the_script_is_installed_under_this_name():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert setup["options.entry_points"]["console_scripts"].split("=")[0].strip() == "sparsellm"
    assert "sparsellm = launch.console:main" in setup["options.entry_points"]["console_scripts"]


def test_help_names_every_command_and_imports_neither_torch_nor_hydra():
    check = f"{SCRIPT}; import sys; print(sorted({{'torch', 'hydra', 'omegaconf', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", check, "--help"], cwd=ROOT, env=quiet_environment({}), capture_output=True, text=True,
        timeout=60, check=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    for name in COMMANDS:
        assert any(line.split()[:1] == [name] for line in lines), name
    assert lines[-1] == "[]"


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_each_command_has_help(name: str):
    done = sparsellm(name, "--help")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 2 or COMMANDS[name].module in done.stdout


def test_a_command_answers_as_its_module_does(tmp_path: Path):
    arguments = ["experiment=demo", "trainer.max_steps=7", "run_name=named", "dry_run=true"]
    ours = sparsellm("launch", *arguments, cwd=tmp_path)
    assert ours.stdout == run_command(["launch", *arguments], cwd=tmp_path).stdout
    assert "trainer.max_steps=7 run_name=named" in ours.stdout


def test_an_unknown_command_ends_with_one_sentence():
    done = sparsellm("lunch")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: sparsellm lunch: there is no such command; give one of launch, plan,")
    assert completion_script("zsh").startswith("autoload -U +X bashcompinit")
    with pytest.raises(ValueError, match=r"completion fish: there is no such script; give one of bash, zsh\."):
        completion_script("fish")


def test_completions_are_the_commands_then_the_schemas_words():
    assert completions(["la"]) == ["launch ", "law "]
    assert completions(["launch", "model=llama2_1b_1"]) == [
        "model=llama2_1b_1216 ", "model=llama2_1b_1536 ", "model=llama2_1b_1728 ", "model=llama2_1b_1920 ",
    ]  # fmt: skip
    assert completions(["launch", "x=1", "trainer.max"]) == ["trainer.max_grad_norm=", "trainer.max_steps="]
    assert completions(["launch", "car"]) == ["card."]
    assert completions(["plan", "dev"]) == ["device=", "device_memory=", "devices="]
    assert completions(["plan", "experiment=sparsellm-1b-80p-"]) == ["experiment=sparsellm-1b-80p-small-dense "]
    assert "model=" in completions(["eval", ""])
    assert "folder=" not in completions(["eval", ""])
    assert completions(["lunch", ""]) == []


@pytest.mark.parametrize(("typed", "expected"), [
    ("$PYTHON -m launch experiment=demo model=llama2_1b_12", "llama2_1b_1216"),
    ("$PYTHON -m launch.plan device_", "device_memory="),
    ("sparsellm com", "compact compare completion"),
    ("sparsellm compact ex", "expand="),
])  # fmt: skip
def test_bash_completes(tmp_path: Path, typed: str, expected: str):
    """Bash passes the line so far, and gets the completions of its last word."""
    command = tmp_path / "sparsellm"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{SCRIPT}" "$@"\n')
    command.chmod(0o755)
    script = f"""
        source <(sparsellm completion bash)
        COMP_LINE="{typed}"; COMP_POINT=${{#COMP_LINE}}; COMP_WORDS=($COMP_LINE)
        _complete_sparsellm
        echo "${{COMPREPLY[@]}}"
    """
    environment = quiet_environment({"PYTHON": sys.executable, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"})
    done = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.split() == expected.split()
