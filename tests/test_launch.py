"""From a config to the command that starts it, on this machine."""

from __future__ import annotations

import subprocess
import sys

import pytest

from conf.compose import composed
from launch.__main__ import job_name
from launch.command import accelerate_command, child_environment, num_gpus, num_processes
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
    assert any(item.endswith("gpu.yaml" if gpus else "cpu.yaml") for item in command)
    assert command[-len(overrides) - 2 :] == ["-m", "train", *overrides]


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


def test_a_sweep_over_experiments_gives_each_its_folder_and_goes_on_after_a_bad_job(tmp_path):
    arguments = ["launch", "-m", "experiment=demo,sparsellm-1b-80p", "sparsity.target=0.5,1.5", "dry_run=true"]
    done = run_command(arguments, cwd=tmp_path)
    assert done.returncode != 0
    jobs = [line.split("run_name=")[1] for line in done.stdout.splitlines() if line.startswith("accelerate")]
    assert jobs == [f"sweep/experiment-{name}_sparsity.target-0.5" for name in ("demo", "sparsellm-1b-80p")]
    assert done.stderr.count("sparsity.target=1.5 is outside") == 2
    assert "2 of the sweep's jobs failed" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_sweep_into_one_folder_is_refused():
    done = run_command(["launch", "-m", "experiment=demo", "run_name=one", "sparsity.target=0,0.5", "dry_run=true"])
    assert "give sweep_name instead" in done.stderr
    assert done.returncode != 0


@pytest.mark.parametrize("module", ["launch.__main__", "launch.plan.__main__", "sparsity", "train.data.pipeline"])
def test_starting_needs_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False).returncode == 0
