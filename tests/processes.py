"""A launched run for tests that interrupt it: its processes, its progress, and signals at chosen steps."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.commands import ROOT, quiet_environment

PATIENCE_S = 300.0
"""The seconds to wait for a run: so many that other work on the machine does not look like a hang."""
PYTHON_LAUNCH = (sys.executable, "-m", "launch")


class LaunchedRun:
    """A `python -m launch ARGUMENTS` in the background, whose output goes to files beside `run_dir`.

    `command` is started in place of `python -m launch`.
    """

    def __init__(
        self, arguments: Sequence[str], run_dir: Path, command: Sequence[str] = PYTHON_LAUNCH, **environment: str
    ) -> None:
        self.run_dir = run_dir
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        self._out, self._err = (run_dir.with_name(f"{run_dir.name}.{kind}") for kind in ("out", "err"))
        with open(self._out, "w") as out, open(self._err, "w") as err:
            self.process = subprocess.Popen(
                [*command, *arguments],
                cwd=ROOT,
                env=quiet_environment(environment),
                stdout=out,
                stderr=err,
            )

    @property
    def stdout(self) -> str:
        return self._out.read_text()

    @property
    def stderr(self) -> str:
        return self._err.read_text()

    def last_step(self) -> int:
        return last_step(self.run_dir)

    def ranks(self) -> list[int]:
        """Return the process ids of the ranks, in rank order."""
        found = {}
        for pid in descendants(self.process.pid):
            environment = environment_of(pid)
            if "RANK" in environment and is_train(pid) and environment_of(parent_of(pid)).get("RANK") is None:
                found[int(environment["RANK"])] = pid
        return [found[rank] for rank in sorted(found)]

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
        """Wait until `condition()` is true; raise AssertionError if the run ends first or the time is up."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None, f"the run ended first: {self.stderr[-2000:]}"
            assert time.monotonic() < deadline, f"not within {timeout_s} s: {self.stderr[-2000:]}"
            time.sleep(0.005)

    def wait_for_step(self, step: int) -> None:
        self.wait_until(lambda: self.last_step() >= step)

    def kill_all(self) -> None:
        """Send SIGKILL to the launcher, its agent and every rank."""
        pids = [self.process.pid, *descendants(self.process.pid)]
        for pid in pids:
            send(pid, signal.SIGKILL)
        self.process.wait(30)

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill_all()
            raise AssertionError(f"still running after {timeout_s} s: {self.stderr[-2000:]}") from None


@contextlib.contextmanager
def launched(
    arguments: Sequence[str], run_dir: Path, command: Sequence[str] = PYTHON_LAUNCH, **environment: str
) -> Iterator[LaunchedRun]:
    """Start a run, and kill it afterwards if it has not ended."""
    run = LaunchedRun(arguments, run_dir, command, **environment)
    try:
        yield run
    finally:
        if run.process.poll() is None:
            run.kill_all()


def last_step(run_dir: Path) -> int:
    """Return the step of the last complete record, or 0 if there is none."""
    metrics = run_dir / "metrics.jsonl"
    if not metrics.exists():
        return 0
    lines = metrics.read_bytes().split(b"\n")[:-1]
    return int(json.loads(lines[-1])["train/global_step"]) if lines else 0


def send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def descendants(pid: int) -> list[int]:
    """Return all processes below `pid`, including those in other sessions."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            children.setdefault(parent_of(int(entry.name)), []).append(int(entry.name))
    found, waiting = [], [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return 0


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def environment_of(pid: int) -> dict[str, str]:
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def is_train(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"train" in words or any(word.endswith(b"train/__main__.py") for word in words)
