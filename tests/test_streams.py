"""The surroundings of a command: the encoding and end of its output, the files in its folder, wandb's variables."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from conf.schema import LoggerConfig
from tests.commands import ROOT, quiet_environment, run_command
from tests.test_run import tiny, write_text
from train.record.wandb_key import MODES, check_wandb

ROOMS = ("conf", "sparsity", "train", "launch", "eval")


def calls_that_guess_the_encoding(source: str) -> Iterator[str]:
    """Yield each call that opens a text file or reads a program's output in the locale's encoding."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or "encoding" in (
            keywords := {word.arg: word.value for word in node.keywords}
        ):
            continue
        called = ast.unparse(node.func)
        name = called.rpartition(".")[2]
        is_text = ast.unparse(keywords.get("text", ast.Constant(False))) == "True"
        mode = keywords.get("mode", ast.Constant("r"))
        if called in ("open", "io.open") and len(node.args) > 1:
            mode = node.args[1]
        elif called.endswith(".open") and called not in ("io.open", "os.open", "gzip.open") and node.args:
            mode = node.args[0]
        opens_text = (
            name == "open" and called not in ("os.open", "gzip.open") and "b" not in ast.unparse(mode).strip("'")
        )
        least = {"read_text": 0, "write_text": 1}.get(name, 99)
        if opens_text or len(node.args) <= least < 99 or (is_text and name in ("run", "Popen", "check_output")):
            yield ast.unparse(node)


def test_every_text_file_is_utf_8_whatever_the_locale():
    found = {
        str(path.relative_to(ROOT)): guessing
        for room in ROOMS
        for path in sorted((ROOT / room).rglob("*.py"))
        if (guessing := list(calls_that_guess_the_encoding(path.read_text(encoding="utf-8"))))
    }
    assert found == {}


@pytest.mark.parametrize(
    ("source", "guesses"),
    [
        ("open(path)", True),
        ("open(path, 'w')", True),
        ("open(path, 'rb')", False),
        ("path.open('a')", True),
        ("path.read_text()", True),
        ("path.write_text(words)", True),
        ("path.write_text(words, encoding='utf-8')", False),
        ("subprocess.run(words, text=True)", True),
        ("os.open(path, flags)", False),
    ],
)
def test_the_search_for_guessed_encodings_finds_them(source, guesses):
    assert bool(list(calls_that_guess_the_encoding(source))) == guesses


PRINTING = """
import sys
from conf.streams import keep_writing, write_any_character
KEEP() if KEEP else None
print("loss λ = 2 µ", flush=True)
sys.stdout.write("more" * 50_000)
sys.stdout.flush()
print("still here", file=sys.stderr)
"""


def printing(function: str, stdout, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-c", PRINTING.replace("KEEP", function)], stdout=stdout, stderr=subprocess.PIPE, cwd=ROOT,
        env=quiet_environment(environment), timeout=60, check=False,
    )  # fmt: skip


def test_a_character_that_the_output_lacks_is_an_escape():
    done = printing("write_any_character", subprocess.PIPE, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(rb"loss \u03bb = 2 \xb5")


@pytest.mark.parametrize("options", [{}, {"PYTHONUNBUFFERED": "1"}, {"PYTHONIOENCODING": "latin-1"}])
def test_a_run_outlives_its_output(options):
    reading, writing = os.pipe()
    os.close(reading)
    done = printing("keep_writing", writing, **options)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"still here\n")
    with open("/dev/full", "wb") as full:
        assert printing("keep_writing", full, **options).returncode == 0
    assert printing("keep_writing", subprocess.PIPE, **options).stdout.endswith(b"moremore")


def test_a_command_whose_product_is_its_output_ends_quietly_with_its_reader(tmp_path):
    command = f"{sys.executable} -m launch.plan series=[demo] figure=null | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=quiet_environment({}), capture_output=True, timeout=120, check=False
    )
    assert done.returncode in (0, 141)
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr


def test_a_mode_that_wandb_does_not_know_is_refused_before_time_is_spent(tmp_path, monkeypatch):
    monkeypatch.setattr("train.record.wandb_key.has_wandb_key", lambda: False)
    with pytest.raises(ValueError, match="WANDB_MODE=dry is not known to wandb: set one of online, offline"):
        check_wandb(LoggerConfig(), {"WANDB_MODE": "dry"})
    for logger, environment in (
        (LoggerConfig(), {}),
        (LoggerConfig(), {"WANDB_MODE": ""}),
        (LoggerConfig(), {"WANDB_MODE": "disabled"}),
        (LoggerConfig(wandb=False), {"WANDB_MODE": "dry"}),
        (LoggerConfig(mode="offline"), {"WANDB_MODE": "dry"}),
    ):
        check_wandb(logger, environment)
    for logger, environment in ((LoggerConfig(mode="online"), {}), (LoggerConfig(), {"WANDB_MODE": "online"})):
        with pytest.raises(ValueError, match="=online needs an account"):
            check_wandb(logger, environment)
    monkeypatch.setattr("train.record.wandb_key.find_spec", lambda _: None)
    with pytest.raises(ValueError, match="needs the library wandb: pip install wandb, or set logger=none"):
        check_wandb(LoggerConfig(), {})


def test_the_launcher_refuses_a_wrong_wandb_mode(tmp_path):
    done = run_command(["launch", "experiment=demo", "dry_run=true"], cwd=tmp_path, WANDB_MODE="dry")
    assert (done.returncode, done.stdout) == (2, "")
    assert "error: WANDB_MODE=dry is not known to wandb" in done.stderr


def test_the_modes_are_wandbs_own():
    settings = pytest.importorskip("wandb").Settings
    assert set(MODES) == set(get_args(get_type_hints(settings)["mode"]))


def users_files(folder: Path, without: str = "launch") -> None:
    """Write files that a user may have in their own project."""
    for name in {"launch", "train", "eval", "sparsity", "conf/__init__"} - {without}:
        file = folder / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text("raise SystemExit('the file of the user was executed')\n")


DRY_RUN = ["experiment=demo", "dry_run=true"]


@pytest.mark.parametrize(
    "command",
    [["launch", *DRY_RUN], ["launch.plan", "-h"], ["train", "-h"], ["train.data", "-h"], ["eval.compact", "-h"]],
)
def test_files_of_the_current_folder_are_not_taken_for_ours(command, tmp_path):
    users_files(tmp_path, without=command[0].partition(".")[0])
    done = run_command(command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "of the user" not in done.stdout + done.stderr
    if "dry_run=true" in command:
        assert f"note: in this folder `-m train` runs {tmp_path}/train.py instead of sparsellm's: set" in done.stderr
        assert f"`-m eval` runs {tmp_path}/eval.py" in done.stderr
        assert "conf" not in done.stderr


@pytest.mark.parametrize(
    "command", [["launch", *DRY_RUN], ["plan", "-h"], ["train", "-h"], ["eval", "-h"], ["report", "-h"]]
)
def test_the_script_sparsellm_sees_no_file_of_the_current_folder(command, tmp_path):
    script = tmp_path / "bin" / "sparsellm"
    script.parent.mkdir()
    script.write_text("from launch.console import main\nmain()\n")
    users_files(tmp_path, without="")
    done = subprocess.run(
        [sys.executable, str(script), *command], cwd=tmp_path, env=quiet_environment({}), capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "of the user" not in done.stdout + done.stderr
    assert done.stderr.count("instead of sparsellm's") == (3 if "dry_run=true" in command else 0)


def test_a_safe_path_hides_a_file_named_like_the_command_itself(tmp_path):
    users_files(tmp_path, without="")
    # Launches of other tests in this process may have set the variable.
    assert "of the user" in run_command(["launch", *DRY_RUN], cwd=tmp_path, PYTHONSAFEPATH="").stderr
    assert run_command(["launch", *DRY_RUN], cwd=tmp_path, PYTHONSAFEPATH="1").returncode == 0


@pytest.mark.slow
def test_a_run_is_finished_in_a_folder_with_a_train_py_in_ascii_and_with_its_output_closed(tmp_path):
    users_files(tmp_path)
    write_text(tmp_path / "text.jsonl")
    arguments = [*tiny(tmp_path), "logger=none", "trainer.max_steps=8", "prompt=λ ", "card.license=mit"]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "launch", *arguments], cwd=tmp_path, stdout=writing, stderr=subprocess.PIPE, timeout=280,
        env=quiet_environment({"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}),
        check=False,
    )  # fmt: skip
    os.close(writing)
    assert done.returncode == 0, done.stderr.decode()
    (summary,) = tmp_path.glob("runs/*/summary.json")
    assert json.loads(summary.read_text(encoding="utf-8"))["steps"] == 8
    card = (summary.parent / "model" / "README.md").read_text(encoding="utf-8")
    assert len(card) > 1000
    assert (summary.parent / "sample.txt").read_text(encoding="utf-8").startswith("λ")
    assert "warning" not in done.stderr.decode()
