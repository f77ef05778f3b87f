"""A run on two hosts, and what happens when the cable between them is pulled."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.commands import ROOT, errors_in, quiet_environment
from tests.distributed import free_port
from tests.hosts import CABLE, Host, missing_for_hosts, plug, two_hosts
from tests.interrupted import interrupted, records_of, tensors_of
from tests.processes import descendants, last_step, send

TIMEOUT_S = 10
LEEWAY_S = 45
"""The seconds in which survivors must find the lost ranks and all processes must end, on a slow machine."""

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


@pytest.fixture
def hosts():
    if why := missing_for_hosts():
        pytest.skip(why)
    with two_hosts() as hosts:
        yield hosts


class Pair:
    """A `python -m launch` on each host, with one rank each."""

    def __init__(self, hosts: list[Host], folder: Path, name: str) -> None:
        self.run_dir = folder / "runs" / name
        self.run_dir.parent.mkdir(exist_ok=True)
        port = free_port()
        self.errors = [self.run_dir.with_name(f"{name}.{port}.{host.address}.err") for host in hosts]
        self.processes = []
        for rank, (host, file) in enumerate(zip(hosts, self.errors, strict=True)):
            arguments = interrupted(
                folder, name, "logger=none", f"trainer.ddp_timeout={TIMEOUT_S}", "launch.num_processes=1",
                "launch.num_machines=2", f"launch.machine_rank={rank}",
                f"launch.main_process_ip={hosts[0].address}", f"launch.main_process_port={port}",
            )  # fmt: skip
            command = host.command([sys.executable, "-m", "launch", *arguments])
            environment = quiet_environment({"GLOO_SOCKET_IFNAME": CABLE})
            with open(file, "w") as words:
                self.processes.append(
                    subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=words)
                )

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                for pid in [process.pid, *descendants(process.pid)]:
                    send(pid, 9)
                process.wait()

    def wait_for_step(self, step: int, timeout_s: float = 240) -> None:
        deadline = time.monotonic() + timeout_s
        while last_step(self.run_dir) < step:
            assert all(process.poll() is None for process in self.processes), self.words()
            assert time.monotonic() < deadline, self.words()
            time.sleep(0.02)

    def wait(self, timeout_s: float) -> list[int]:
        deadline = time.monotonic() + timeout_s
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]

    def words(self) -> str:
        return "\n".join(file.read_text()[-2000:] for file in self.errors)


def test_two_hosts_train_as_one_and_go_on_after_a_pulled_cable(hosts, folder, whole):
    with Pair(hosts, folder, "hosts") as pair:
        pair.wait_for_step(12)
        plug(hosts[1], is_in=False)
        pulled = time.monotonic()
        codes = pair.wait(TIMEOUT_S + LEEWAY_S)
        assert time.monotonic() - pulled >= TIMEOUT_S - 1
        assert 0 not in codes
        assert 75 not in codes
        first, second = (errors_in(file.read_text()) for file in pair.errors)
        assert "rank 1 (in step" in first[0]
        assert "does not answer" in first[0]
        assert f"{TIMEOUT_S}000ms" in first[0]
        assert "the launcher does not answer" in second[0]
        assert "Traceback" not in pair.words()
    plug(hosts[1], is_in=True)
    with Pair(hosts, folder, "hosts") as pair:
        assert pair.wait(300) == [0, 0], pair.words()
        assert "Traceback" not in pair.words()
    # The numbers equal those of an undisturbed run of two ranks on one machine, to the last bit.
    assert records_of(folder / "runs" / "hosts") == records_of(whole)
    assert tensors_of(folder / "runs" / "hosts", "model/*.safetensors") == tensors_of(whole, "model/*.safetensors")
