"""Every command that the documentation or a comment of a config prints is accepted: its config composes, and its modules,
options and files exist."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from conf.compose import composed
from eval.model.series import with_series_defaults
from launch.commands import COMMANDS
from launch.plan.request import read_request
from launch.sweep import read_sweep
from tests.commands import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS = {command.module: command.config for command in COMMANDS.values()}
PLACEHOLDERS = {"NAME": "demo", "DIR": "dir", "DIR2": "dir2", "DIR3": "dir3", "FOLDER": "dir"}
PLUGINS = {"submitit": ("hydra_submitit_launcher", "slurm"), "optuna": ("hydra_optuna_sweeper", "search")}
"""Plugins of Hydra by a word of the commands that need them, and the extra that installs each."""


@dataclass(frozen=True)
class Command:
    """A command as a page prints it."""

    page: str
    words: tuple[str, ...]

    @property
    def module(self) -> str:
        """The module that it runs."""
        if self.words[0] == "sparsellm":
            return COMMANDS[self.words[1]].module
        return self.words[self.words.index("-m") + 1]

    @property
    def arguments(self) -> list[str]:
        """The words behind the module."""
        start = 2 if self.words[0] == "sparsellm" else self.words.index("-m") + 2
        return [re.sub(r"(?<![\w.])[A-Z]+\d?(?![\w.])", _filled, word) for word in self.words[start:]]

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.words)}"


def _filled(match: re.Match[str]) -> str:
    return PLACEHOLDERS.get(match[0], match[0])


def commands_of(text: str, page: str) -> list[Command]:
    """Return the commands of a page, those in code blocks and those in a line of text, without comments."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = re.sub(r"\\\n\s*", " ", "".join(blocks)).splitlines()
    lines += re.findall(r"`((?:python -m|sparsellm|accelerate launch) [^`]+)`", re.sub(r"(?ms)^```.*?^```$", "", text))
    found = []
    for line in lines:
        match = re.search(r"(?:^|\s)((?:accelerate launch .*?-m|python -m|sparsellm) \w[\w.]*(?: .*)?)$", line)
        if match and "..." not in match[1] and " [" not in match[1]:
            words = shlex.split(re.sub(r"\s+#\s.*", "", match[1]))
            found.append(Command(page, tuple(words[: words.index("&&")] if "&&" in words else words)))
    return found


def commands_of_comments(text: str, name: str) -> list[Command]:
    """Return the commands of a yaml file's comments, without the words that say what they do."""
    lines = re.sub(r"\\\n#\s*", "", text).splitlines()
    found = [re.match(r"#\s+((?:python -m|accelerate launch) .*?)(?:\s{3,}.*)?$", line) for line in lines]
    return commands_of("\n".join(["```", *(match[1] for match in found if match), "```"]), name)


def all_commands() -> list[Command]:
    """Return the commands of all pages and configs; one that several of them print belongs to the first."""
    found = [command for page in PAGES for command in commands_of(page.read_text(encoding="utf-8"), page.name)]
    for file in sorted((ROOT / "conf").rglob("*.yaml")):
        name = str(file.relative_to(ROOT))
        found += commands_of_comments(file.read_text(encoding="utf-8"), name)
    known: dict[tuple[str, ...], Command] = {}
    for command in found:
        known.setdefault(command.words, command)
    return list(known.values())


FOUND = all_commands()


def accept(command: Command) -> None:
    """Compose what the command asks for, as its module would.

    Raises:
        ValueError: An argument is not accepted.
    """
    arguments, config = command.arguments, CONFIGS[command.module]
    if "--help" in arguments or not arguments:
        return
    if command.module == "launch":
        read_sweep([argument for argument in arguments if argument != "-m"])
    elif command.module == "launch.plan":
        read_request(arguments)
    elif command.module == "eval":
        composed(config, with_series_defaults(arguments))
    else:
        composed(config, [argument for argument in arguments if not argument.startswith("shard=")])


def test_commands_are_found_on_many_pages():
    assert len(FOUND) > 180
    assert len({command.page for command in FOUND}) > 50
    words = "```\npython -m eval a=1 \\\n  b=2  # c\n```\nand `sparsellm plan x=3` or `python -m eval ...`"
    assert [command.words for command in commands_of(words, "x")] == [
        ("python", "-m", "eval", "a=1", "b=2"),
        ("sparsellm", "plan", "x=3"),
    ]


@pytest.mark.parametrize("command", [command for command in FOUND if command.module in CONFIGS], ids=str)
def test_a_printed_command_is_accepted(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if command.page == "own_methods.md" and "my.module" in str(command):
        pytest.skip("the page's own module is not there")
    for word, (plugin, extra) in PLUGINS.items():
        if word in str(command):
            pytest.importorskip(f"hydra_plugins.{plugin}", reason=f"pip install 'sparsellm[{extra}]'")
    monkeypatch.chdir(tmp_path)
    accept(command)


@pytest.mark.parametrize("command", [command for command in FOUND if command.module not in CONFIGS], ids=str)
def test_a_printed_module_exists_and_has_the_printed_options(command: Command):
    assert find_spec(command.module) is not None
    if command.module.startswith("tests."):
        place = ROOT.joinpath(*command.module.split("."))
        files = place.glob("*.py") if place.is_dir() else [place.with_suffix(".py")]
        source = "".join(file.read_text(encoding="utf-8") for file in [*files, ROOT / "tests/benchmarks/common.py"])
        options = [word for word in command.arguments if word.startswith("--")]
        # An option is written out, or made from the name of a keyword argument.
        written, names = re.findall(r'"(--[a-z-]+)"', source), re.findall(r"\b(\w+)=", source)
        assert set(options) <= {*written, *(f"--{name}" for name in names)}


@pytest.mark.parametrize("command", [command for command in FOUND if "--config_file" in command.words], ids=str)
def test_a_printed_config_of_accelerate_exists(command: Command):
    assert (ROOT / command.words[command.words.index("--config_file") + 1]).is_file()
