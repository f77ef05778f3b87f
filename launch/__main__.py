"""From a config to processes on this machine: `python -m launch experiment=demo [key=value ...]`, with -m a sweep."""

import os
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from conf import cli, schema
from launch.command import accelerate_command, child_environment, num_gpus, num_processes, printable
from launch.process import run_child
from train.plan import plan_run

schema.register()


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="train")
def main(cfg: DictConfig) -> None:
    with cli.user_errors():
        overrides = [item for item in HydraConfig.get().overrides.task if not item.startswith("dry_run=")]
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            cfg.run_name = f"{cfg.sweep_name or 'sweep'}/{HydraConfig.get().job.override_dirname or 'run'}"
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
    if code:
        sys.exit(code if code > 0 else 128 - code)


if __name__ == "__main__":
    main()
