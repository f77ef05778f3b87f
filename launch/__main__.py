"""From a config to processes on this machine: `python -m launch experiment=demo [key=value ...]`, with -m a sweep."""

import os
import re
import sys
from collections.abc import Container, Sequence

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
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
    if is_sweep:
        cfg.run_name = f"{cfg.sweep_name}/{job_name(overrides, swept_keys())}"
        overrides.append(f"run_name={cfg.run_name}")
    try:
        code = launch(cfg, overrides)
    except cli.USER_ERRORS as error:
        if not is_sweep:
            cli.fail(error)
        # The other jobs of a sweep are run all the same.
        print(f"error: {cfg.run_name}: {cli.sentence(error)}", file=sys.stderr)
        code = cli.USER_ERROR_CODE
    if code and is_sweep:
        failed_jobs[str(cfg.run_name)] = code
    elif code:
        sys.exit(code if code > 0 else 128 - code)


def launch(cfg: DictConfig, overrides: list[str]) -> int:
    """Start the run that `cfg` describes and wait for it; its exit code. A ValueError says why it can't be."""
    config = cli.typed(cfg)
    gpus = num_gpus(os.environ)
    plan_run(config, num_processes(config, gpus))
    command = accelerate_command(config, overrides, gpus)
    if config.dry_run:
        print(printable(command))
        return 0
    print(f"$ {printable(command)}", file=sys.stderr, flush=True)
    return run_child(command, child_environment(os.environ, gpus))


def swept_keys() -> set[str]:
    """The keys that a sweep gives several values."""
    overrides = [item for item in sys.argv[1:] if not item.startswith("-")]
    parsed = OverridesParser.create().parse_overrides(overrides)
    params = HydraConfig.get().sweeper.get("params") or {}
    return {override.key_or_group for override in parsed if override.is_sweep_override()} | set(params)


def job_name(overrides: Sequence[str], swept: Container[str]) -> str:
    """A sweep job's folder: its values of the swept keys, with only what file systems and Hydra take without quotes."""
    own = sorted(item for item in overrides if item.split("=")[0] in swept)
    return re.sub(r"[^\w.+]+", "-", "_".join(own)).strip("-") or "job"


def prepare_arguments(arguments: list[str]) -> list[str]:
    """The command line for Hydra: one run is checked here, in one sentence; a sweep gets a name, its jobs get theirs."""
    if not {"-m", "--multirun"} & set(arguments):
        check_arguments("train", arguments)
        return arguments
    named = [item for item in arguments if item.startswith("run_name=")]
    if named:
        raise ValueError(f"{named[0]} would put all jobs of a sweep in one folder: give sweep_name instead.")
    is_named = any(item.startswith("sweep_name=") for item in arguments)
    return arguments if is_named else [*arguments, "sweep_name=sweep"]


if __name__ == "__main__":
    with cli.user_errors():
        sys.argv[1:] = prepare_arguments(sys.argv[1:])
    main()
    if failed_jobs:
        names = ", ".join(f"{name} (exit code {code})" for name, code in failed_jobs.items())
        sys.exit(f"error: {len(failed_jobs)} of the sweep's jobs failed: {names}.")
