"""The command that starts a run on this machine: `accelerate launch` with the config that fits."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from conf.schema import Config

CONFIGS = Path(__file__).parent / "accelerate"
DEFAULT_CPU_PROCESSES = 2


def num_gpus(environment: Mapping[str, str]) -> int:
    """GPUs that this process may use, without importing torch."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=60, check=False)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines()) if listed.returncode == 0 else 0


def num_processes(config: Config, gpus: int) -> int:
    """The processes a run gets here; a ValueError where more are asked for than there are GPUs."""
    asked = config.launch.num_processes
    if asked is not None and 0 < gpus < asked:
        raise ValueError(
            f"launch.num_processes={asked}, but this machine has {gpus} GPU{'s' if gpus > 1 else ''}: take at most "
            f"{gpus}, or set CUDA_VISIBLE_DEVICES= to run on its CPUs."
        )
    return asked or gpus or DEFAULT_CPU_PROCESSES


def accelerate_command(config: Config, overrides: Sequence[str], gpus: int) -> list[str]:
    """`accelerate launch ... -m train OVERRIDES`, run by this Python through `launch.agent`."""
    processes = num_processes(config, gpus)
    config_file = config.launch.config_file or str(_shortest(CONFIGS / ("gpu.yaml" if gpus else "cpu.yaml")))
    if not Path(config_file).is_file():
        raise ValueError(
            f"launch.config_file={config_file} does not exist: give an accelerate config, or leave it null."
        )
    return [
        sys.executable,
        "-m",
        "launch.agent",
        "--config_file",
        config_file,
        "--num_processes",
        str(processes),
        "--main_process_port",
        "0",
        "--max_restarts",
        str(config.launch.max_restarts),
        "-m",
        "train",
        *overrides,
    ]


def child_environment(environment: Mapping[str, str], gpus: int) -> dict[str, str]:
    """What the processes inherit: one thread each unless told otherwise, and the package where it is not installed."""
    root = str(Path(__file__).parent.parent)
    python_path = [root, environment["PYTHONPATH"]] if environment.get("PYTHONPATH") else [root]
    return {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        **environment,
        "PYTHONPATH": os.pathsep.join(python_path),
        **({} if gpus else {"CUDA_VISIBLE_DEVICES": ""}),
    }


def printable(command: Sequence[str]) -> str:
    """The command for a person to type, with accelerate by its own name."""
    from shlex import join

    return join(["accelerate", "launch", *command[3:]])


def _shortest(path: Path) -> Path:
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path
