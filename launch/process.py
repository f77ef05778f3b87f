"""Child processes that end when their parent does, get its signals, and run a few at a time."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

from launch.ahead import AgentAhead
from train.faults.preempt import SIGNALS
from train.faults.process import die_with_parent

FORWARDED = SIGNALS
POLL_S = 0.05


@dataclass(frozen=True)
class Task:
    """A command with its environment; its output goes to `log`, or to this terminal if that is None."""

    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path | None = None

    def start(self, changes: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start the command in a session of its own, with `changes` to its environment."""
        if self.log is not None:
            self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") if self.log is not None else contextlib.nullcontext() as words:
            return subprocess.Popen(
                self.command,
                env={**self.environment, **changes},
                stdout=words,
                stderr=words,
                start_new_session=True,
                preexec_fn=partial(die_with_parent, os.getpid()),
            )


@dataclass(frozen=True)
class WaitingTask(Task):
    """A task whose process was started before its command was known."""

    agent: AgentAhead | None = None

    def start(self, changes: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Give the command to the waiting process, with `changes` to its environment."""
        assert self.agent is not None
        return self.agent.start(self.command, {**self.environment, **changes})


def run_child(command: Sequence[str], environment: Mapping[str, str], agent: AgentAhead | None = None) -> int:
    """Run `command`, forward this process's signals to it, and return its exit code.

    Args:
        command: The program and its arguments.
        environment: The environment variables of the process.
        agent: A process that waits for the command; without it a new one is started.
    """
    task = Task(command, environment) if agent is None else WaitingTask(command, environment, agent=agent)
    (code,) = run_children([task])
    assert code is not None
    return code


def run_children(
    tasks: Sequence[Task],
    places: Sequence[Mapping[str, str]] = ({},),
    on_start: Callable[[int], None] = lambda _: None,
    on_end: Callable[[int, int], None] = lambda *_: None,
) -> list[int | None]:
    """Run tasks in order, as many at a time as there are places.

    A signal to this process is forwarded to all running tasks, and no further task is started after it.

    Args:
        tasks: The tasks.
        places: For each task that can run at a time, changes to its environment, such as the GPUs that it may use.
        on_start: Called with a task's index before it starts.
        on_end: Called with a task's index and exit code after it has ended.

    Returns:
        The exit code of each task; None for a task that was not started.
    """
    codes: list[int | None] = [None] * len(tasks)
    running: dict[int, tuple[int, subprocess.Popen[bytes]]] = {}
    waiting = list(range(len(tasks)))
    with forwarding(lambda: [child for _, child in running.values()]) as heard:
        while running or (waiting and not heard):
            for place in range(len(places)):
                if place not in running and waiting and not heard:
                    index = waiting.pop(0)
                    on_start(index)
                    child = tasks[index].start(places[place])
                    running[place] = (index, child)
                    for number in heard:
                        # The signal came while the child was being started.
                        child.send_signal(number)
            time.sleep(POLL_S)
            for place, (index, child) in list(running.items()):
                code = child.poll()
                if code is not None:
                    del running[place]
                    codes[index] = code
                    on_end(index, code)
    return codes


@contextlib.contextmanager
def forwarding(children: Callable[[], Sequence[subprocess.Popen[bytes]]]) -> Iterator[list[int]]:
    """Forward signals to the running children; yield the list of signals received so far."""
    heard: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        heard.append(number)
        for child in children():
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
