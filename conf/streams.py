"""Standard streams that never end a command, whether a character is unknown, a pipe closed or a disk full."""

from __future__ import annotations

import io
import os
import sys
from typing import Any


class SteadyFile(io.FileIO):
    """A file that drops what cannot be written to it."""

    def write(self, data: Any) -> int:
        """Write data and return its size; report data that cannot be written as written too."""
        try:
            return super().write(data) or 0
        except OSError:
            return memoryview(data).nbytes


def write_any_character() -> None:
    """Make `print` write escapes, instead of raising, for characters that the terminal's encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def keep_writing() -> None:
    """Keep the process running if its output cannot be written, because a pipe is closed or the disk is full.

    This is for commands that produce files. For a command whose product is its output, a failed write must be an error.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            steady: Any = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - open until the process ends
        elif isinstance(stream, io.TextIOWrapper):
            steady = _steady(stream)
        else:
            continue
        setattr(sys, name, steady)
        setattr(sys, f"__{name}__", steady)


def _steady(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    raw = SteadyFile(stream.fileno(), "wb", closefd=False)
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
