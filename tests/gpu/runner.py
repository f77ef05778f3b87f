"""A runner for steps on a device that is available only for minutes: each step is a process with its own time limit.

If a step fails or hangs, the others still run. The results file is written again after every step, so that results are kept
if the machine goes away. A step reports figures by writing JSON to the file that the variable STEP_FIGURES names.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from tests.processes import environment_of, is_alive, send

ROOT = Path(__file__).resolve().parents[2]
FIGURES = "STEP_FIGURES"
MARK = "SPARSELLM_STEP"
"""A variable in the environment of a step's processes; the runner finds them by it, even in another session."""
GRACE_S = 2.0
POLL_S = 0.05
TAIL_BYTES = {"passed": 6_000, "failed": 24_000}
Outcome = Literal["passed", "failed", "timed out", "not run"]


@dataclass(frozen=True)
class Step:
    """A process to run. It starts only if `expected_s` of the budget are left, and ends after `timeout_s` at the latest.

    A step that is `alone` shares the device with no other step, because it is timed. `needs` are packages that must be
    importable.
    """

    name: str
    command: tuple[str, ...]
    expected_s: float
    timeout_s: float
    alone: bool = False
    needs: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    says: str = ""
    """Words that mark the line of output to show; if empty, the last line is shown."""


@dataclass
class Result:
    name: str
    outcome: Outcome
    seconds: float
    words: str
    """One line: the last line of the output, or the reason why the step did not run."""
    command: str
    figures: Any = None


class Running:
    """A step's processes while they run."""

    def __init__(self, step: Step, folder: Path, environment: Mapping[str, str], limit_s: float) -> None:
        self.step, self.limit_s = step, limit_s
        self.mark = uuid.uuid4().hex
        self.output = folder / f"{self.mark}.out"
        self.figures = folder / f"{self.mark}.json"
        self.started = time.monotonic()
        variables = {**environment, **step.environment, MARK: self.mark, FIGURES: str(self.figures)}
        with open(self.output, "wb") as output:
            self.process = subprocess.Popen(
                step.command, cwd=ROOT, env=variables, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def end(self) -> None:
        """End every process of the step, also those in other sessions."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + GRACE_S
            while (pids := processes_with(self.mark)) and time.monotonic() < deadline:
                for pid in pids:
                    send(pid, number)
                self.process.poll()
                time.sleep(POLL_S)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE_S)

    def result(self) -> Result | None:
        """Return the result of the step, or None while it runs."""
        code = self.process.poll()
        is_late = code is None and self.seconds > self.limit_s
        if code is None and not is_late:
            return None
        seconds = self.seconds
        self.end()
        outcome: Outcome = "timed out" if is_late else "passed" if code == 0 else "failed"
        words = last_line(self.output, "" if code else self.step.says)
        if is_late:
            words = f"longer than {self.limit_s:.0f} s; its last line: {words}"
        elif code:
            words = f"exit code {code}: {words}"
        command = shlex.join(["python" if word == sys.executable else word for word in self.step.command])
        return Result(self.step.name, outcome, round(seconds, 1), words, command, self.read_figures())

    def read_figures(self) -> Any:
        try:
            return json.loads(self.figures.read_text())
        except (OSError, ValueError):
            return None


def processes_with(mark: str) -> list[int]:
    """Return the ids of living processes that have `mark` in their environment."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [pid for pid in pids if environment_of(pid).get(MARK) == mark and is_alive(pid)]


def last_line(output: Path, words: str = "", width: int = 240) -> str:
    """Return the last line that contains `words`, or else the last line that is not only a rule."""
    lines = [line for line in tail(output, 4_000).splitlines() if line.strip(" -=\t")]
    lines = [line for line in lines if words in line] or lines
    return lines[-1].strip()[:width] if lines else ""


def tail(output: Path, num_bytes: int) -> str:
    with open(output, "rb") as file:
        file.seek(max(0, os.path.getsize(output) - num_bytes))
        return file.read().decode(errors="replace").replace("\r", "\n")


class Record:
    """The results file and the log of one command, written as steps end."""

    def __init__(self, command: str, folder: Path, budget_s: float, details: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.results, self.log = folder / f"{command}.json", folder / f"{command}.log"
        self.log.write_text("")
        self.head = {"command": f"python -m tests.gpu {' '.join(sys.argv[1:])}", "budget_s": budget_s, **details}
        self.steps: list[Result] = []
        self.started = time.monotonic()

    def add(self, result: Result, output: Path | None = None) -> None:
        self.steps.append(result)
        content = {**self.head, "seconds": round(time.monotonic() - self.started, 1)}
        content["steps"] = [asdict(step) for step in self.steps]
        aside = self.results.with_suffix(".tmp")
        aside.write_text(json.dumps(content, indent=1) + "\n")
        aside.replace(self.results)
        if output is not None:
            kept = tail(output, TAIL_BYTES["passed" if result.outcome == "passed" else "failed"])
            with open(self.log, "a") as log:
                log.write(f"==== {result.name}: {result.outcome} in {result.seconds} s\n$ {result.command}\n{kept}\n")
        print(f"{result.outcome:>9}  {result.seconds:6.1f} s  {result.name:<34} {result.words}", flush=True)
        if result.outcome in ("failed", "timed out") and output is not None:
            for line in telling_lines(tail(output, 8_000)):
                print(f"           | {line}", flush=True)


def telling_lines(text: str, most: int = 6, width: int = 200) -> list[str]:
    """Return the lines that say why a step failed: pytest's FAILED and ERROR lines, or else the last lines."""
    lines = [line.rstrip()[:width] for line in text.splitlines() if line.strip()]
    return [line for line in lines if line.startswith(("FAILED", "ERROR", "error:"))][-most:] or lines[-most:]


def run_steps(
    command: str,
    steps: Sequence[Step],
    folder: Path,
    *,
    budget_s: float,
    parallel: int,
    environment: Mapping[str, str],
    details: Mapping[str, Any],
    work: Path | None = None,
) -> list[Result]:
    """Run the steps in order, and return the result of each.

    Args:
        command: The name of the results file and the log, without their suffixes.
        steps: The steps.
        folder: The folder for these two files; the runner writes no other file there.
        budget_s: The seconds for all steps. A step that no longer fits is recorded as not run.
        parallel: The number of steps that may run at a time.
        environment: The environment variables of every step.
        details: Further keys of the results file.
        work: A folder for the output of steps, removed at the end.
    """
    record = Record(command, folder, budget_s, details)
    work = work or Path(tempfile.mkdtemp(prefix="sparsellm-gpu-"))
    waiting, running = list(steps), list[Running]()
    deadline = time.monotonic() + budget_s
    try:
        while waiting or running:
            for one in list(running):
                if (result := one.result()) is not None:
                    running.remove(one)
                    record.add(result, one.output)
            while waiting and may_start(waiting[0], [one.step for one in running], parallel):
                step, left = waiting.pop(0), deadline - time.monotonic()
                if (reason := refusal(step, left)) is not None:
                    record.add(Result(step.name, "not run", 0.0, reason, shlex.join(step.command)))
                    continue
                running.append(Running(step, work, environment, min(step.timeout_s, left)))
            time.sleep(POLL_S)
    finally:
        for one in running:
            one.end()
            words = f"stopped; its last line: {last_line(one.output)}"
            record.add(
                Result(one.step.name, "timed out", round(one.seconds, 1), words, "", one.read_figures()), one.output
            )
        shutil.rmtree(work, ignore_errors=True)
    return record.steps


def may_start(step: Step, running: Sequence[Step], parallel: int) -> bool:
    if step.alone or any(other.alone for other in running):
        return not running
    return len(running) < parallel


def refusal(step: Step, left_s: float, is_there: Callable[[str], Any] = find_spec) -> str | None:
    """Return the reason why a step is not started, or None if it is."""
    missing = [package for package in step.needs if is_there(package) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    if left_s < step.expected_s:
        return f"out of time: {max(0.0, left_s):.0f} s left of the budget, it takes some {step.expected_s:.0f} s"
    return None
