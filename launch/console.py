"""The command `sparsellm`: one name for the modules that a user runs.

`sparsellm launch ...` is `python -m launch ...`, and likewise for every command. A command's module is imported only when
the command is known, so that `sparsellm --help` answers at once.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from launch.commands import COMMANDS

SHELLS = ("bash", "zsh")
USAGE = """\
usage: sparsellm COMMAND [key=value ...]

{commands}

  sparsellm COMMAND --help      the command's keys, with examples
  sparsellm completion bash     a script that completes commands and keys; also zsh:
                                source <(sparsellm completion bash)

`python -m MODULE` runs the same command without the script: {modules}.
"""


def usage() -> str:
    """Return the text of `sparsellm --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return USAGE.format(
        commands="\n".join(lines), modules=", ".join(command.module for command in COMMANDS.values())
    ).rstrip()


def completion_script(shell: str) -> str:
    """Return the script that a shell sources to complete `sparsellm`.

    Raises:
        ValueError: There is no script for the shell.
    """
    if shell not in SHELLS:
        raise ValueError(f"completion {shell}: there is no such script; give one of {', '.join(SHELLS)}.")
    script = Path(__file__).with_name("completion.bash").read_text(encoding="utf-8")
    # zsh's module bashcompinit runs completions written for bash.
    return f"autoload -U +X bashcompinit && bashcompinit\n{script}" if shell == "zsh" else script


def run(module: str, name: str, arguments: list[str]) -> None:
    """Run a module as `python -m` does, with these arguments."""
    sys.argv = [name, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def main() -> None:
    """Run the command that the command line names; for an unknown one, print an error and exit with code 2."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help", "help"):
        print(usage())
    elif name == "completion":
        try:
            print(completion_script(arguments[0] if arguments else "bash"))
        except ValueError as error:
            _refuse(str(error))
    elif name == "complete":
        from launch.completion import completions

        print("\n".join(completions(arguments)))
    elif name in COMMANDS:
        run(COMMANDS[name].module, f"sparsellm {name}", arguments)
    else:
        _refuse(f"sparsellm {name}: there is no such command; give one of {', '.join(COMMANDS)}.")


def _refuse(sentence: str) -> None:
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
