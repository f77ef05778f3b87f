"""A SLURM cluster of one node for tests: munged, slurmctld and slurmd below one folder, as root and without systemd."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.distributed import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo")

CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={controller_port}
SlurmdPort={node_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
ReturnToService=2
KillWait=20
InactiveLimit=0
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=1000 State=UNKNOWN
PartitionName=usual Nodes={host} Default=YES PriorityTier=1 GraceTime=30 OverSubscribe=NO MaxTime=INFINITE State=UP
PartitionName=urgent Nodes={host} PriorityTier=2 OverSubscribe=NO MaxTime=INFINITE State=UP
"""


def missing_for_slurm() -> str | None:
    """Return the reason why SLURM cannot be started here, or None if it can."""
    if os.geteuid() != 0:
        return "starting a SLURM needs root"
    missing = [name for name in PROGRAMS if shutil.which(name, path=search_path()) is None]
    return f"not installed: {', '.join(missing)} (apt-get install slurm-wlm munge)" if missing else None


def search_path() -> str:
    return f"/usr/sbin:/sbin:{os.environ['PATH']}"


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Run a cluster on this machine; yield the environment variables with which sbatch and srun find it."""
    host = socket.gethostname().split(".")[0]
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    cpus = os.cpu_count() or 1
    config = CONFIG.format(folder=folder, host=host, cpus=cpus, controller_port=free_port(), node_port=free_port())
    (folder / "slurm.conf").write_text(config)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    folder.chmod(0o755)
    environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": search_path()}
    daemons: list[subprocess.Popen[bytes]] = []
    commands = [
        ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket",
         f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed"],
        ["slurmctld", "-D", "-i"],
        ["slurmd", "-D", "-N", host],
    ]  # fmt: skip
    try:
        for command in commands:
            log = open(folder / f"{command[0]}.out", "wb")  # noqa: SIM115 - the daemon's
            daemons.append(subprocess.Popen(command, env={**os.environ, **environment}, stdout=log, stderr=log))
            if command[0] == "munged":
                wait_for(lambda: (folder / "munge.socket").exists(), 20, "munged's socket")
        wait_for(lambda: "idle" in output(["sinfo", "--noheader", "--format=%t"], environment), 60, "an idle node")
        yield environment
    finally:
        with contextlib.suppress(subprocess.SubprocessError, OSError):
            output(["scancel", "--user=root", "--signal=KILL"], environment)
            output(["scancel", "--user=root"], environment)
            wait_for(lambda: not output(["squeue", "--noheader"], environment).strip(), 20, "an empty queue")
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in reversed(daemons):
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def output(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60, check=False
    )
    return done.stdout


def wait_for(condition, timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come within {timeout_s} s")
        time.sleep(0.2)
