"""The command that starts a run on this machine, made from the run's config."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from conf.compose import composed
from conf.schema import LaunchConfig
from launch.command import CONFIGS, accelerate_command, child_environment, gpu_bytes, num_gpus, num_processes
from launch.local import plan_jobs
from launch.machines import Machines, find_machines
from launch.sweep import job_name, places, read_sweep
from tests.commands import ROOT, run_command


@pytest.mark.parametrize(
    ("gpus", "asked", "expected"), [(0, None, 2), (0, 3, 3), (1, None, 1), (8, None, 8), (8, 2, 2)]
)
def test_a_run_gets_all_gpus_or_two_cpu_processes(gpus, asked, expected):
    overrides = ["experiment=demo"] + ([f"launch.num_processes={asked}"] if asked else [])
    config = composed("train", overrides)
    assert num_processes(config, gpus) == expected
    command = accelerate_command(config, overrides, gpus)
    assert command[command.index("--num_processes") + 1] == str(expected)
    file = {0: "cpu.yaml", 1: "gpu.yaml"}.get(min(gpus, expected), "gpus.yaml")
    assert any(item.endswith(f"/{file}") for item in command)
    assert command[-len(overrides) - 2 :] == ["-m", "train", *overrides]


def flags(command: list[str]) -> dict[str, str]:
    """Return the options of `accelerate launch` in a command."""
    options = command[3 : command.index("-m", 3)]
    return {name.removeprefix("--"): value for name, value in zip(options[::2], options[1::2], strict=True)}


def test_a_machine_among_several_gets_its_rank_and_the_first_ones_address():
    config = composed("train", ["experiment=demo"])
    found = flags(accelerate_command(config, [], gpus=8, machines=Machines(4, 2, "node7", 23456)))
    assert found.pop("config_file").endswith("nodes.yaml")
    assert found == {
        "num_processes": "32", "num_machines": "4", "machine_rank": "2", "main_process_ip": "node7",
        "main_process_port": "23456", "max_restarts": "0",
    }  # fmt: skip


def test_replicas_are_hsdp_over_all_processes():
    config = composed("train", ["experiment=demo", "launch.num_replicas=4"])
    found = flags(accelerate_command(config, [], gpus=8, machines=Machines(4, 0, "node7", 23456)))
    assert found["config_file"].endswith("hsdp.yaml")
    assert found["parallelism_config_dp_replicate_size"] == "4"
    assert found["parallelism_config_dp_shard_size"] == "8"
    assert flags(accelerate_command(config, [], gpus=8))["num_machines"] == "1"
    with pytest.raises(ValueError, match=r"launch.num_replicas=4 cannot share 4 processes"):
        accelerate_command(config, [], gpus=4)


@pytest.mark.parametrize(
    ("gpus", "memory", "overrides", "expected"),
    [
        (1, 80 << 30, [], "false"),
        (8, 80 << 30, [], "false"),
        (8, 12 << 30, [], "true"),
        (8, 14 << 30, [], "false"),
        # Each of a replica's four GPUs holds more of the state.
        (8, 14 << 30, ["launch.num_replicas=2"], "true"),
        (8, None, [], None),
        (8, 80 << 30, ["launch.config_file=setup.cfg"], None),
        (8, 80 << 30, ["launch.reshard_after_forward=true"], "true"),
        (0, None, ["launch.reshard_after_forward=false"], "false"),
    ],
)
def test_gathered_weights_are_kept_where_a_gpus_memory_has_room(gpus, memory, overrides, expected):
    overrides = ["experiment=sparsellm-1b-80p", "trainer.per_device_train_batch_size=1", *overrides]
    command = accelerate_command(composed("train", overrides), [], gpus=gpus, device_bytes=memory)
    assert flags(command).get("fsdp_reshard_after_forward") == expected


def test_the_choice_reaches_fsdp2_past_the_config_file(monkeypatch):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    config = composed("train", ["experiment=demo", "launch.reshard_after_forward=false"])
    command = accelerate_command(config, [], gpus=0)
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(command[3:]))
    assert prepare_multi_gpu_env(arguments)["FSDP_RESHARD_AFTER_FORWARD"] == "false"


def test_reshard_after_forward_is_a_choice_of_three():
    assert LaunchConfig(reshard_after_forward=True).reshard_after_forward == "true"  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"launch.reshard_after_forward=often is not known: choose one of auto, true"):
        LaunchConfig(reshard_after_forward="often")


def test_one_gpus_own_config_keeps_gathered_weights():
    kept = {file.name for file in CONFIGS.glob("*.yaml") if "fsdp_reshard_after_forward: false" in file.read_text()}
    assert kept == {"gpu.yaml"}


NVIDIA_SMI = """#!/bin/sh
if [ "$1" = --query-gpu=memory.total ]; then echo 81559; echo 143771; else echo "GPU 0: one"; echo "GPU 1: two"; fi
"""


def test_the_smallest_gpus_memory_is_asked_of_nvidia_smi(monkeypatch, tmp_path):
    (tmp_path / "nvidia-smi").write_text(NVIDIA_SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert gpu_bytes({}) == 81559 << 20
    assert gpu_bytes({"CUDA_VISIBLE_DEVICES": ""}) is None
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    assert gpu_bytes({"CUDA_VISIBLE_DEVICES": "0"}) is None


STEP = {
    "SLURM_JOB_ID": "1234567", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "node[3-4]",
}  # fmt: skip


def test_a_slurm_step_tells_the_machines(monkeypatch):
    monkeypatch.setattr("launch.machines.host_names", lambda listed: {"node[3-4]": ["node3", "node4"]}[listed])
    assert find_machines(LaunchConfig(), STEP) == Machines(2, 1, "node3", 24567)
    own_port = find_machines(LaunchConfig(num_machines=2, main_process_port=29500, main_process_ip="ib-node3"), STEP)
    assert own_port == Machines(2, 1, "ib-node3", 29500)
    assert find_machines(LaunchConfig(num_machines=1), STEP) == Machines()


def test_a_batch_script_outside_a_step_is_one_machine():
    batch = {"SLURM_JOB_ID": "1", "SLURM_NNODES": "2", "SLURM_NODEID": "0", "SLURM_PROCID": "0"}
    assert find_machines(LaunchConfig(), batch) == Machines()


def test_several_tasks_on_a_node_are_refused():
    with pytest.raises(ValueError, match=r"srun started 8 tasks on 1 node.*--ntasks-per-node=1"):
        find_machines(LaunchConfig(), {**STEP, "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "8"})


def test_several_machines_need_to_be_told_where_they_meet():
    with pytest.raises(ValueError, match=r"needs launch.main_process_ip and launch.main_process_port on each machine"):
        find_machines(LaunchConfig(num_machines=2, machine_rank=0), {})
    with pytest.raises(ValueError, match=r"launch.machine_rank=2 must be from 0 to launch.num_machines - 1 = 1"):
        LaunchConfig(num_machines=2, machine_rank=2)


def test_more_processes_than_gpus_are_refused():
    with pytest.raises(ValueError, match=r"launch.num_processes=4, but this machine has 2 GPUs"):
        num_processes(composed("train", ["experiment=demo", "launch.num_processes=4"]), gpus=2)


@pytest.mark.parametrize(("visible", "expected"), [("", 0), ("0", 1), ("0,1,5", 3), ("-1", 0)])
def test_visible_devices_are_counted(visible, expected):
    assert num_gpus({"CUDA_VISIBLE_DEVICES": visible}) == expected


def test_children_get_one_thread_unless_told_otherwise():
    assert child_environment({}, gpus=0)["OMP_NUM_THREADS"] == "1"
    assert child_environment({"OMP_NUM_THREADS": "4"}, gpus=0)["OMP_NUM_THREADS"] == "4"
    assert child_environment({}, gpus=0)["CUDA_VISIBLE_DEVICES"] == ""
    assert "CUDA_VISIBLE_DEVICES" not in child_environment({}, gpus=2)


def test_dry_run_prints_the_command_and_stops(tmp_path):
    done = run_command(["launch", "experiment=demo", "trainer.max_steps=40", "dry_run=true"], cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith("accelerate launch --config_file ")
    assert done.stdout.strip().endswith("-m train experiment=demo trainer.max_steps=40")
    assert not list(tmp_path.iterdir())


def test_a_sweep_makes_one_command_a_job_with_a_folder_each(tmp_path):
    arguments = ["launch", "-m", "experiment=demo", "sweep_name=levels", "sparsity.target=0,0.5,0.8", "dry_run=true"]
    done = run_command(arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    jobs = [line.split()[-1] for line in done.stdout.splitlines() if line.startswith("accelerate")]
    assert jobs == [f"run_name=levels/sparsity.target-{target}" for target in ("0", "0.5", "0.8")]
    for job in jobs:
        assert composed("train", [job]).run_name == job.removeprefix("run_name=")


def test_job_names_tell_the_swept_values_alone_and_need_no_quotes():
    overrides = ["experiment=demo", "trainer.seed=1", "sparsity.window={start:0.25,end:1}"]
    assert (
        job_name(overrides, {"sparsity.window", "trainer.seed"}) == "sparsity.window-start-0.25-end-1-_trainer.seed-1"
    )
    assert job_name(["experiment=demo"], {"experiment"}) == "experiment-demo"


def test_a_sweep_over_experiments_gives_each_its_folder():
    sweep = read_sweep(["experiment=demo,sparsellm-1b-80p", "sparsity.target=0.5"])
    assert [job.name for job in sweep.jobs] == ["sweep/experiment-demo", "sweep/experiment-sparsellm-1b-80p"]
    assert sweep.fixed_keys == ("sparsity.target", "sweep_name")
    assert sweep.is_local


def test_a_sweep_with_a_bad_job_starts_none_and_names_every_bad_one(tmp_path):
    arguments = ["launch", "-m", "experiment=demo,sparsellm-1b-80p", "sparsity.target=0.5,1.5", "dry_run=true"]
    done = run_command(arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "2 of the sweep's 4 jobs cannot be, so none was started" in done.stderr
    assert done.stderr.count("sparsity.target=1.5 is outside") == 2
    assert "Traceback" not in done.stderr


def test_what_only_the_plan_can_know_is_refused_before_any_job_starts():
    sweep = read_sweep(["experiment=demo", "batch_size=16,17", "trainer.max_steps=8,40"])
    with pytest.raises(ValueError, match=r"2 of the sweep's 4 jobs cannot be.*batch_size=17 cannot be shared") as error:
        plan_jobs(sweep, {job.name: 2 for job in sweep.jobs})
    assert str(error.value).count("cannot be shared") == 2


def test_one_run_that_joins_a_sweep_is_called_by_what_was_asked_for():
    own = ["experiment=demo", "launch.num_processes=1", "sparsity.target=0.5", "trainer.seed=1"]
    sweep = read_sweep([*own, "sweep_name=s"])
    assert [job.name for job in sweep.jobs] == ["s/sparsity.target-0.5_trainer.seed-1"]
    assert {"experiment", "launch.num_processes", "sweep_name"} <= set(sweep.fixed_keys)
    alone = read_sweep(own)
    assert (alone.name, [job.name for job in alone.jobs]) == (None, ["demo"])


def test_nothing_swept_is_one_run_under_its_own_name():
    sweep = read_sweep(["hydra/launcher=submitit_local", "experiment=demo", "run_name=mine"])
    assert [job.name for job in sweep.jobs] == ["mine"]
    assert sweep.name is None
    assert not sweep.is_local


@pytest.mark.parametrize("values", ["data.path=a/b,a-b", "sparsity.target=0.2,0.4,0.2"])
def test_two_jobs_of_one_name_are_refused(values):
    with pytest.raises(
        ValueError, match=r"(data.path=a/b and data.path=a-b|target=0.2 and sparsity.target=0.2) would share"
    ):
        read_sweep(["experiment=demo", "data=text", "data.path=c", values])


@pytest.mark.cluster
def test_a_searchs_name_and_values_are_checked_before_it_starts():
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="pip install 'sparsellm[search]'")
    search = ["experiment=demo", "sweep=optuna_window", "sparsity.schedule=choice(cubic,linear)"]
    with pytest.raises(ValueError, match=r"sweep_name=\.\./\.\./x leaves the runs folder"):
        read_sweep([*search, "sweep_name=../../x"])
    with pytest.raises(ValueError, match=r"sparsity\.target=1\.5 is outside"):
        read_sweep([*search, "sparsity.target=1.5"])
    sweep = read_sweep([*search, "sweep_name=s", "runs_dir=elsewhere"])
    assert (sweep.jobs, str(sweep.folder)) == ((), "elsewhere/s")


EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))


def test_the_command_that_prepares_the_text_fits_every_experiment():
    (printed,) = re.findall(r"srun -N1 -n1 python -m train\.data (.*)", (ROOT / "docs" / "clusters.md").read_text())
    assert len(EXPERIMENTS) > 10
    for experiment in EXPERIMENTS:
        assert composed("train", printed.replace("experiment=NAME", f"experiment={experiment}").split()).data.source


def test_named_sweeps_have_their_jobs():
    levels = read_sweep(["experiment=demo", "sweep=sparsity_levels", "sweep_name=s"])
    assert [job.config.sparsity.target for job in levels.jobs] == [0, 0.2, 0.4, 0.6, 0.8]
    assert len({job.name for job in levels.jobs}) == 5
    grid = read_sweep(["experiment=demo", "sweep=prune_window"])
    assert len({job.name for job in grid.jobs}) == 40
    pairs = read_sweep(["experiment=demo", "sweep=twin_pairs"])
    assert [job.config.model.match for job in pairs.jobs].count("average") == len(pairs.jobs) / 2


@pytest.mark.parametrize(
    ("gpus", "num_processes", "parallel_jobs", "expected"),
    [
        ([], None, None, [None]),
        ([], 2, 3, [None, None, None]),
        (["0", "1", "2", "3"], None, None, ["0,1,2,3"]),
        (["4", "5", "6", "7"], 2, None, ["4,5", "6,7"]),
        (["GPU-a", "GPU-b", "GPU-c"], 1, 2, ["GPU-a", "GPU-b"]),
    ],
)
def test_jobs_share_the_gpus_and_take_turns_on_cpus(gpus, num_processes, parallel_jobs, expected):
    launch = LaunchConfig(num_processes=num_processes, parallel_jobs=parallel_jobs)
    assert [place.get("CUDA_VISIBLE_DEVICES") for place in places(launch, gpus)] == expected


def test_more_jobs_at_a_time_than_gpus_hold_are_refused():
    with pytest.raises(ValueError, match=r"launch.parallel_jobs=3 jobs of 2 processes need 6 GPUs, and there are 4"):
        places(LaunchConfig(num_processes=2, parallel_jobs=3), ["0", "1", "2", "3"])


def test_a_sweep_into_one_folder_is_refused():
    done = run_command(["launch", "-m", "experiment=demo", "run_name=one", "sparsity.target=0,0.5", "dry_run=true"])
    assert "give sweep_name instead" in done.stderr
    assert done.returncode != 0


@pytest.mark.parametrize("module", ["launch.__main__", "launch.plan.__main__", "sparsity", "train.data.pipeline"])
def test_starting_needs_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False).returncode == 0
