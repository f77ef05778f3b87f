"""The README stays short and its commands work; the documentation builds and has no broken link."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launch.console import COMMANDS
from tests.commands import ROOT, quiet_environment, run_command

README = (ROOT / "README.md").read_text(encoding="utf-8")
MAX_WORDS = 800


def blocks(language: str) -> list[str]:
    """Return the README's code blocks of a language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [body for named, body in found if named == language]


def readme_commands() -> list[list[str]]:
    """Return the `python -m ...` commands of the README, without comments and with lines joined."""
    lines = "".join(blocks("")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[2:] for line in lines if line.startswith("python -m ")]


def test_the_readme_has_at_most_800_words():
    assert len(README.split()) <= MAX_WORDS


def test_every_link_of_the_readme_and_of_contributing_leads_somewhere():
    for name in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            # These three pages are generated from the code when the site is built.
            is_made = target in ("docs/commands.md", "docs/config.md", "docs/api.md")
            assert "://" in target or is_made or (ROOT / target).exists(), f"{name}: {target}"


def test_the_readme_shows_each_kind_of_command():
    modules = {words[0] for words in readme_commands()}
    assert {"launch", "launch.plan", "eval", "eval.report"} <= modules
    assert modules <= {command.module for command in COMMANDS.values()}


@pytest.mark.parametrize("words", [words for words in readme_commands() if words[0] in ("launch", "launch.plan")],
                         ids=" ".join)  # fmt: skip
def test_runs_and_plans_of_the_readme_can_be_started(words: list[str], tmp_path: Path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "text.txt").write_text("some text", encoding="utf-8")
    words = [*words, "dry_run=true"] if words[0] == "launch" else [*words, "figure=null"]
    done = run_command(words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_make_knows_the_targets_that_the_readme_names():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_python_blocks_of_the_readme_compile():
    for block in blocks("python"):
        compile(block, "README.md", "exec")


@pytest.mark.slow
def test_the_site_builds_strictly_and_has_a_page_of_every_kind(tmp_path: Path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    environment = quiet_environment({"NO_MKDOCS_2_WARNING": "1", "PATH": os.environ["PATH"]})
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    page = {
        name: (tmp_path / "site" / name / "index.html").read_text(encoding="utf-8")
        for name in ("config", "api", "commands")
    }
    assert "sparsity.window.start" in page["config"]
    assert "lr_scheduler_kwargs" in page["config"]
    assert "SparsityCallback" in page["api"]
    assert "usage: sparsellm COMMAND" in page["commands"]
