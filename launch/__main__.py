"""The command `python -m launch experiment=demo [key=value ...]`, which starts a run, or with -m a sweep."""

import os
import sys

from train.faults.preempt import end_when_asked

if __name__ == "__main__":
    end_when_asked()

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from conf import cli, schema
from conf.compose import check_arguments, prepared
from conf.streams import keep_writing
from launch.ahead import AgentAhead, agent_ahead
from launch.command import child_environment
from launch.help import help_text
from launch.local import sweep_here
from launch.remote import check_plugins, run_job, run_trial, sweep_elsewhere
from launch.run import exit_code, start_run
from launch.sweep import is_key, read_sweep

schema.register()
MULTIRUN = ("-m", "--multirun")


def one_run(agent: AgentAhead | None = None) -> None:
    """Compose the run of the command line, start it and wait for it.

    Args:
        agent: A process that already waits for the run's command; without it a new one is started.
    """

    @hydra.main(version_base="1.3", config_path="pkg://conf", config_name="train")
    def body(cfg: DictConfig) -> None:
        overrides = [item for item in HydraConfig.get().overrides.task if not item.startswith("dry_run=")]
        with cli.user_errors():
            code = start_run(cli.typed(cfg), overrides, agent)
        if code:
            sys.exit(exit_code(code))

    body()


def sweep(arguments: list[str]) -> int:
    check_plugins(arguments)
    asked = read_sweep(arguments)
    return sweep_here(asked) if asked.is_local else sweep_elsewhere(asked, arguments)


def main(arguments: list[str]) -> None:
    if {"--help", "-h"} & set(arguments):
        with cli.user_errors():
            groups = [item for item in arguments if not item.startswith("-")]
            print(help_text(groups[0] if groups else None))
        return
    others = [item for item in arguments if item not in MULTIRUN]
    is_multirun = len(others) < len(arguments)
    with cli.user_errors():
        others = prepared("train", others, is_multirun)
    sys.argv[1:] = [*(item for item in arguments if item in MULTIRUN), *others]
    if any(item.startswith("-") for item in others):
        # Hydra's own flags: --cfg, --info, --shell-completion and the like.
        is_named = any(is_key(item, "sweep_name") for item in others)
        hydra.main(version_base="1.3", config_path="pkg://conf", config_name="train")(
            run_trial if is_named else run_job
        )() if is_multirun else one_run()
    elif is_multirun:
        with cli.user_errors():
            sys.exit(sweep(others))
    elif any(item.startswith("dry_run=") for item in others):
        with cli.user_errors():
            check_arguments("train", others)
        one_run()
    else:
        with agent_ahead(child_environment(os.environ)) as agent:
            with cli.user_errors():
                check_arguments("train", others)
            one_run(agent)


if __name__ == "__main__":
    keep_writing()
    main(sys.argv[1:])
