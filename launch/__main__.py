"""From a config to processes on this machine: `python -m launch experiment=demo [key=value ...]`, with -m a sweep."""

import os
import re
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from conf import cli, schema
from conf.compose import check_arguments
from launch.command import accelerate_command, child_environment, num_gpus, num_processes, printable
from launch.process import run_child
from train.plan import plan_run

schema.register()
failed_jobs: dict[str, int] = {}


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="train")
def main(cfg: DictConfig) -> None:
    overrides = [item for item in HydraConfig.get().overrides.task if not item.startswith("dry_run=")]
    is_sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    with cli.user_errors():
        if is_sweep:
            cfg.run_name = f"{cfg.sweep_name or 'sweep'}/{job_name(HydraConfig.get().job.override_dirname)}"
            overrides.append(f"run_name={cfg.run_name}")
        config = cli.typed(cfg)
        gpus = num_gpus(os.environ)
        plan_run(config, num_processes(config, gpus))
        command = accelerate_command(config, overrides, gpus)
    if config.dry_run:
        print(printable(command))
        return
    print(f"$ {printable(command)}", file=sys.stderr, flush=True)
    code = run_child(command, child_environment(os.environ, gpus))
    if code and is_sweep:
        failed_jobs[str(cfg.run_name)] = code
    elif code:
        sys.exit(code if code > 0 else 128 - code)


def job_name(overrides: str) -> str:
    """A sweep job's folder: its overrides, with only what file systems and Hydra take without quotes."""
    return re.sub(r"[^\w.+]+", "-", overrides).strip("-") or "job"


if __name__ == "__main__":
    with cli.user_errors():
        check_arguments("train", sys.argv[1:])
    main()
    if failed_jobs:
        names = ", ".join(f"{name} (exit code {code})" for name, code in failed_jobs.items())
        sys.exit(f"error: {len(failed_jobs)} of the sweep's jobs failed: {names}.")
