"""Signals: a run heeds the first at once or at a step's end, and a second one at once."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.commands import ROOT, quiet_environment

LISTEN = """
import ctypes, os, signal, time
from train.faults.preempt import Preemption
preemption = Preemption()
preemption.at_step_ends = {at_step_ends}
preemption.listen()
print("ready", flush=True)
if {blocked}:
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.siginterrupt(number, False)
    ctypes.CDLL(None).read(os.pipe()[0], ctypes.create_string_buffer(1), 1)
else:
    time.sleep(30)
"""


@pytest.mark.parametrize("blocked", [False, True], ids=["in Python", "inside a library's call"])
def test_a_second_signal_is_obeyed_at_once_and_an_echo_of_the_first_is_not(blocked):
    with listening(at_step_ends=True, blocked=blocked) as process:
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGUSR1)
        time.sleep(1.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 128 + signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_a_signal_before_the_first_step_ends_the_process_at_once(number):
    with listening(at_step_ends=False, blocked=False) as process:
        process.send_signal(number)
        assert process.wait(15) == 75


@pytest.mark.parametrize("module", ["launch", "launch.agent"])
def test_a_launcher_heeds_signals_before_it_imports_what_takes_long(module):
    process = subprocess.Popen([sys.executable, "-m", module, "run_name=never"], cwd=ROOT, env=quiet_environment({}))
    try:
        deadline = time.monotonic() + 60
        while not catches(process.pid, signal.SIGUSR1) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()
        process.send_signal(signal.SIGUSR1)
        assert process.wait(60) == 75
    finally:
        process.kill()


def catches(pid: int, number: signal.Signals) -> bool:
    """Return whether a process has installed a handler for a signal."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (mask,) = [line.split()[1] for line in lines if line.startswith("SigCgt:")]
    return bool(int(mask, 16) >> (number - 1) & 1)


class listening:
    """A process that listens for the cluster's signals, and is killed afterwards."""

    def __init__(self, **options: bool) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", LISTEN.format(**options)],
            cwd=ROOT, env=quiet_environment({}), stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __enter__(self) -> subprocess.Popen[str]:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"
        return self.process

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
