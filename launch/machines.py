"""The machines of a run: only this one, those that the configuration names, or the nodes of a SLURM step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from conf.schema import LaunchConfig
from sparsity.common.programs import run_program

FIRST_PORT, NUM_PORTS = 20_000, 10_000
"""The range of ports for SLURM jobs. A job's number chooses its port, so that two jobs on one node seldom share one."""


@dataclass(frozen=True)
class Machines:
    """`num` machines, of which this is number `rank`; they meet at machine 0's `address` and `port`."""

    num: int = 1
    rank: int = 0
    address: str | None = None
    port: int = 0
    """0 chooses a free port, which works only on a single machine: others could not know it."""


def find_machines(launch: LaunchConfig, environment: Mapping[str, str]) -> Machines:
    """Return the machines of a run, from the configuration and, if that leaves something out, from SLURM.

    Raises:
        ValueError: Neither gives the machine's rank, or the address or port of machine 0.
    """
    slurm = slurm_machines(environment)
    num = launch.num_machines or (slurm.num if slurm else 1)
    if num == 1:
        return Machines(port=launch.main_process_port or 0)
    fitting = slurm if slurm and slurm.num == num else None
    rank = launch.machine_rank if launch.machine_rank is not None else fitting.rank if fitting else None
    address = launch.main_process_ip or (fitting.address if fitting else None)
    port = launch.main_process_port or (fitting.port if fitting else None)
    missing = {"machine_rank": rank, "main_process_ip": address, "main_process_port": port}
    keys = [f"launch.{key}" for key, value in missing.items() if value is None]
    if keys:
        raise ValueError(
            f"launch.num_machines={num} needs {' and '.join(keys)} on each machine: set them, or start one task per node "
            "with srun, which sets them."
        )
    assert rank is not None
    assert port is not None
    return Machines(num, rank, address, port)


def slurm_machines(environment: Mapping[str, str]) -> Machines | None:
    """Return the nodes of the SLURM step that this process is a task of; None outside one.

    A batch script by itself is not a step: what it starts without srun runs only on its own machine.

    Raises:
        ValueError: srun started more than one task on a node.
    """
    nodes, tasks = environment.get("SLURM_STEP_NUM_NODES"), environment.get("SLURM_STEP_NUM_TASKS")
    if nodes is None or "SLURM_NODEID" not in environment:
        return None
    if tasks is not None and int(tasks) > int(nodes):
        raise ValueError(
            f"srun started {tasks} tasks on {nodes} node{'s' if nodes != '1' else ''}, and each would start all processes "
            "of its machine: use srun --ntasks-per-node=1."
        )
    port = FIRST_PORT + int(environment.get("SLURM_JOB_ID", "0")) % NUM_PORTS
    if nodes == "1":
        return Machines()
    first = host_names(environment["SLURM_STEP_NODELIST"])[0]
    return Machines(int(nodes), int(environment["SLURM_NODEID"]), first, port)


def host_names(node_list: str) -> list[str]:
    """Expand a node list such as `node[1-3,7]` to host names, with SLURM's own command."""
    return run_program(["scontrol", "show", "hostnames", node_list], check=True).stdout.split()
