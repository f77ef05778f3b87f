"""One process of a run: `accelerate launch --config_file launch/accelerate/cpu.yaml -m train experiment=demo`."""

import gc
import os
import signal
import sys

if __name__ == "__main__":
    # Imports make nearly a million objects that live as long as the process; seeking garbage among them takes a second.
    gc.disable()

import hydra
from omegaconf import DictConfig

from conf import cli, schema
from conf.compose import CHECKED, check_arguments, prepared
from conf.schema.checks import check
from conf.streams import keep_writing
from train.determinism import compute_deterministically
from train.faults.error import FAILED_CODE, hand_over
from train.faults.process import AGENT, collect_again, die_with_parent, end_process, end_process_after
from train.faults.stop import RunStopped
from train.plan.batch import world_size_asked
from train.plan.run import plan_run
from train.record.wandb_key import check_wandb

USAGE = """accelerate launch --config_file launch/accelerate/cpu.yaml -m train experiment=demo [key=value ...]
python -m train experiment=demo [key=value ...]                       one process alone
Runs one process of a run. python -m launch starts one for each device here; python -m launch --help lists the keys."""

schema.register()


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="train")
def main(cfg: DictConfig) -> None:
    """Train as the composed configuration says; leave an error to the agent if there is one."""
    try:
        train(cfg)
    except Exception as error:
        if not hand_over(error):
            raise
        end_process(FAILED_CODE)


def train(cfg: DictConfig) -> None:
    """Check the configuration, join the world, and run."""
    # All ranks find the same errors in the configuration, so only rank 0 prints them. torch is imported after the
    # checks.
    is_main = os.environ.get("RANK", "0") == "0"
    with cli.user_errors(quiet=not is_main):
        config = cli.typed(cfg)
        check(not config.dry_run, "dry_run=true is for `python -m launch`, which prints the command: remove it.")
        plan = plan_run(config, world_size_asked(config, os.environ))
        check_wandb(config.logger, os.environ)

    if config.trainer.full_determinism:
        compute_deterministically()

    from train.distributed import join_world
    from train.faults.heartbeat import Heartbeat, is_lost_peer
    from train.faults.preempt import Preemption
    from train.run import run

    collect_again()
    with cli.user_errors(quiet=not is_main):
        world = join_world(config.trainer.ddp_timeout)
    cli.speak()
    preemption, heartbeat = Preemption(), Heartbeat(world.rank, world.size)
    preemption.listen()
    heartbeat.watch_nccl()
    try:
        run(config, plan, world, preemption, heartbeat)
    except RunStopped as stopped:
        world.leave()
        cli.stop(str(stopped), stopped.code, quiet=not is_main)
    except Exception as error:
        if isinstance(error, RuntimeError) and is_lost_peer(error):
            heartbeat.report_and_exit(error)
        heartbeat.post_error()
        raise
    world.leave()


def run_process() -> None:
    """Run this process from its command line to its end."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(USAGE)
        return
    keep_writing()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # The agent's process id is needed because the agent may die while this rank starts.
        agent = os.environ.get(AGENT)
        die_with_parent(int(agent) if agent else None)
        # Until there is something to save, Ctrl-C ends a rank without a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    cli.hush_other_ranks()
    with cli.user_errors():
        sys.argv[1:] = prepared("train", sys.argv[1:])
        if CHECKED not in os.environ:
            check_arguments("train", sys.argv[1:])
    main()


if __name__ == "__main__":
    end_process_after(run_process)
