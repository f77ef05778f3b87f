"""The command that starts a run's processes on this machine: `accelerate launch` with the accelerate config that fits."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from conf.compose import CHECKED
from conf.schema import Config
from launch.machines import Machines
from sparsity.common.programs import run_program
from train.plan.gathering import run_setting
from train.plan.run import plan_run

CONFIGS = Path(__file__).parent / "accelerate"
ALONE = Machines()
DEFAULT_CPU_PROCESSES = 2


def gpu_names(environment: Mapping[str, str]) -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them, without importing torch."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [device.strip() for device in visible.split(",") if device.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = run_program(["nvidia-smi", "--list-gpus"])
    lines = listed.stdout.splitlines() if listed.returncode == 0 else []
    return [str(number) for number in range(sum(line.startswith("GPU ") for line in lines))]


def num_gpus(environment: Mapping[str, str]) -> int:
    """Return the number of GPUs that this process may use."""
    return len(gpu_names(environment))


def gpu_bytes(environment: Mapping[str, str]) -> int | None:
    """Return the bytes of this machine's smallest GPU, without importing torch; None if nvidia-smi does not report them."""
    if not gpu_names(environment) or shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    said = run_program(query)
    mebibytes = [int(line) for line in said.stdout.split() if line.isdecimal()] if said.returncode == 0 else []
    return min(mebibytes) << 20 if mebibytes else None


def num_processes(config: Config, gpus: int) -> int:
    """Return the number of processes of a run on this machine.

    Raises:
        ValueError: The config asks for more processes than there are GPUs.
    """
    asked = config.launch.num_processes
    if asked is not None and 0 < gpus < asked:
        raise ValueError(
            f"launch.num_processes={asked}, but this machine has {gpus} GPU{'s' if gpus > 1 else ''}: use at most {gpus}, "
            "or set CUDA_VISIBLE_DEVICES= to run on its CPUs."
        )
    return asked or gpus or DEFAULT_CPU_PROCESSES


def accelerate_command(
    config: Config,
    overrides: Sequence[str],
    gpus: int,
    machines: Machines = ALONE,
    device_bytes: int | None = None,
) -> list[str]:
    """Return `accelerate launch ... -m train OVERRIDES`, run by this Python through `launch.agent`.

    Args:
        config: The run.
        overrides: The run's overrides, from which `python -m train` composes it again.
        gpus: The number of GPUs of this machine.
        machines: The machines of the run, and which of them this is.
        device_bytes: The memory of a GPU, which decides whether gathered weights are kept (`train.plan.gathering`).

    Raises:
        ValueError: This machine cannot have that many processes or replicas, or launch.config_file does not exist.
    """
    total = num_processes(config, gpus) * machines.num
    replicas = config.launch.num_replicas
    if total % replicas or total // replicas < min(2, replicas):
        raise ValueError(
            f"launch.num_replicas={replicas} does not fit {total} process{'es' if total > 1 else ''}: give each replica "
            "the same number of processes, at least two."
        )
    config_file = config.launch.config_file or str(_shortest(CONFIGS / fitting_config(gpus, total, machines, replicas)))
    if not Path(config_file).is_file():
        raise ValueError(
            f"launch.config_file={config_file} does not exist: give an accelerate config, or leave it null."
        )
    options = {"config_file": config_file, "num_processes": total}
    if machines.num > 1:
        options |= {"num_machines": machines.num, "machine_rank": machines.rank, "main_process_ip": machines.address}
    elif replicas > 1:
        # hsdp.yaml is for two machines.
        options |= {"num_machines": 1}
    options |= {"main_process_port": machines.port, "max_restarts": config.launch.max_restarts}
    if replicas > 1:
        options["parallelism_config_dp_replicate_size"] = replicas
        options["parallelism_config_dp_shard_size"] = total // replicas
    if (reshards := resharding(config, total, device_bytes)) is not None:
        options["fsdp_reshard_after_forward"] = reshards
    flags = [item for key, value in options.items() for item in (f"--{key}", str(value))]
    return [sys.executable, "-m", "launch.agent", *flags, "-m", "train", *overrides]


def resharding(config: Config, world_size: int, device_bytes: int | None) -> str | None:
    """Return accelerate's `fsdp_reshard_after_forward` for a run, or None to keep that of the accelerate config.

    Args:
        config: The run.
        world_size: The number of processes of the run.
        device_bytes: The memory of a GPU; None if it is unknown.
    """
    launch = config.launch
    if launch.reshard_after_forward != "auto":
        return launch.reshard_after_forward
    if device_bytes is None or launch.config_file is not None:
        return None
    # In HSDP a model is sharded over the ranks of one replica.
    plan = replace(plan_run(config, world_size), world_size=world_size // launch.num_replicas)
    return str(run_setting(config, plan, device_bytes).reshard_after_forward).lower()


def fitting_config(gpus: int, total: int, machines: Machines, replicas: int) -> str:
    """Return the name of the file in launch/accelerate for these machines; the command overrides its numbers.

    Args:
        gpus: The number of GPUs of this machine.
        total: The number of processes on all machines.
        machines: The machines of the run.
        replicas: The number of copies of the model.
    """
    if replicas > 1:
        return "hsdp.yaml"
    if not gpus:
        return "cpu.yaml"
    if machines.num > 1:
        return "nodes.yaml"
    return "gpus.yaml" if total > 1 else "gpu.yaml"


def child_environment(environment: Mapping[str, str], gpus: int | None = None) -> dict[str, str]:
    """Return the variables of a run's processes.

    Each process gets one thread, unless the launcher's variables say otherwise, and imports this package rather than one
    in the current folder.

    Args:
        environment: The launcher's variables.
        gpus: The number of GPUs of this machine; None if they have not been counted yet.
    """
    return {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        **environment,
        **import_environment(environment),
        CHECKED: "1",
        **({"CUDA_VISIBLE_DEVICES": ""} if gpus == 0 else {}),
    }


def import_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that make a child import this package, whatever the current folder holds, and use UTF-8."""
    root = str(Path(__file__).parent.parent)
    python_path = [root, environment["PYTHONPATH"]] if environment.get("PYTHONPATH") else [root]
    # In an ASCII locale a prompt or a path would reach the ranks with characters that cannot be written to a file.
    return {"PYTHONPATH": os.pathsep.join(python_path), "PYTHONSAFEPATH": "1", "PYTHONUTF8": "1"}


def printable(command: Sequence[str]) -> str:
    """Return the command as a user would type it: `accelerate launch` replaces our agent."""
    from shlex import join

    return join(["accelerate", "launch", *command[3:]])


def _shortest(path: Path) -> Path:
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path
