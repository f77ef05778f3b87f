"""Two hosts on one machine: network namespaces with a cable between them, which needs iproute2 and root."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

ADDRESSES = ("10.77.31.1", "10.77.31.2")
CABLE = "cable"


@dataclass(frozen=True)
class Host:
    """A network namespace with an address on the cable."""

    name: str
    address: str

    def command(self, words: list[str]) -> list[str]:
        return ["ip", "netns", "exec", self.name, *words]


def missing_for_hosts() -> str | None:
    """Return the reason why two hosts cannot be made here, or None if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "not installed: ip (apt-get install iproute2)"
    probe = subprocess.run(["ip", "netns", "add", _name("probe")], capture_output=True, text=True, check=False)
    if probe.returncode:
        return f"no network namespaces here: {probe.stderr.strip()}"
    _ip("netns", "delete", _name("probe"))
    return None


@contextlib.contextmanager
def two_hosts() -> Iterator[list[Host]]:
    """Make two hosts that reach only each other, over the cable, and remove them afterwards."""
    hosts = [Host(_name(str(number)), address) for number, address in enumerate(ADDRESSES)]
    try:
        for host in hosts:
            _ip("netns", "add", host.name)
        ends = [f"{CABLE}{os.getpid() % 10_000}{end}" for end in "ab"]
        _ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for host, end in zip(hosts, ends, strict=True):
            _ip("link", "set", end, "netns", host.name)
            _ip("-netns", host.name, "link", "set", end, "name", CABLE)
            _ip("-netns", host.name, "address", "add", f"{host.address}/24", "dev", CABLE)
            _ip("-netns", host.name, "link", "set", "lo", "up")
        plug(hosts[0], True)
        plug(hosts[1], True)
        yield hosts
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "delete", host.name], capture_output=True, check=False)


def plug(host: Host, is_in: bool) -> None:
    _ip("-netns", host.name, "link", "set", CABLE, "up" if is_in else "down")


def _name(suffix: str) -> str:
    return f"sparsellm-{os.getpid()}-{suffix}"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30)
