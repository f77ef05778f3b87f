"""Helpers of all command lines of the project: options, typed configs, and errors in one sentence."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from omegaconf import DictConfig

from conf.keys import checked
from conf.streams import write_any_character

USER_ERRORS = (ValueError, OSError)
USER_ERROR_CODE = 2
CLOSED_OUTPUT_CODE = 141
"""The exit code that a shell reports for a program ended by SIGPIPE."""


def typed(cfg: DictConfig) -> Any:
    """Return a composed config as its dataclass, with all values checked.

    Raises:
        ValueError: A value breaks a rule; the message names the remedy.
    """
    return checked(cfg)


def overrides_of(module: str, words: str, examples: str, arguments: Sequence[str]) -> list[str]:
    """Return the key=value arguments of `python -m module`; on --help, print the help and exit.

    Args:
        module: The name of the command's module.
        words: A sentence that says what the command does.
        examples: Example commands with their results, and the place where the keys are documented.
        arguments: The command line after the module.

    Raises:
        ValueError: An argument is neither key=value nor --help.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        usage="%(prog)s key=value ...",
        description=words,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=argparse.SUPPRESS)
    found, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        raise ValueError(f"{unknown[0]} is not an option of python -m {module}: give key=value, or --help.")
    return list(found.overrides)


@contextmanager
def user_errors(quiet: bool = False, also: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn a user's mistake into one sentence on stderr and exit code 2; with HYDRA_FULL_ERROR=1 raise it.

    Args:
        quiet: Print nothing, because another rank prints the sentence.
        also: Exceptions that are a user's mistake here, although elsewhere they would be a bug.
    """
    write_any_character()
    user_mistakes: tuple[type[Exception], ...] = (*USER_ERRORS, *also)
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output, such as `head`, has closed the pipe.
        os._exit(CLOSED_OUTPUT_CODE)
    except user_mistakes as error:
        fail(error, quiet)


def fail(error: Exception, quiet: bool = False) -> None:
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        raise error
    if not quiet:
        print(f"error: {sentence(error)}", file=sys.stderr)
    sys.exit(USER_ERROR_CODE)


def stop(words: str, code: int, quiet: bool = False) -> None:
    """Exit this process with a sentence on stderr and an exit code."""
    if not quiet:
        # The line may still hold a progress bar.
        print(f"\nerror: {words}", file=sys.stderr, flush=True)
    sys.exit(code)


def sentence(error: Exception) -> str:
    """Return an error as one sentence; errors of the operating system get their path."""
    if isinstance(error, OSError) and error.strerror:
        place = f": {error.filename}" if error.filename else ""
        remedies = {
            28: "free some space, or put runs_dir and data.cache_dir on another disk",
            13: "choose a runs_dir and data.cache_dir that you may write to",
            30: "the file system is read-only: choose another runs_dir or data.cache_dir",
        }
        return f"{error.strerror}{place}; {remedies.get(error.errno or 0, 'check the path and its permissions')}."
    return " ".join(str(error).split())


def hush_other_ranks() -> None:
    """Silence stderr on every rank but 0 as long as all ranks would print the same errors; `speak` restores it."""
    if os.environ.get("RANK", "0") != "0":
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - open until `speak`


def speak() -> None:
    sys.stderr = sys.__stderr__
