"""environment.json: enough to know how a run was made, and no secrets."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch

from train.distributed import World
from train.record.snapshot import code_version, kept_variables, snapshot, write_snapshot

WORLD = World(0, 2, torch.device("cpu"))


def test_secrets_are_never_kept_and_other_variables_only_by_name():
    environment = {
        "NCCL_SOCKET_IFNAME": "ib0", "SLURM_JOB_ID": "7", "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline",
        "WANDB_API_KEY": "secret", "HF_TOKEN": "secret", "SLURM_JWT": "secret", "HF_SECRET_THING": "secret",
        "TORCH_AUTH": "secret", "HOME": "/root", "AWS_REGION": "x",
    }  # fmt: skip
    kept = kept_variables(environment)
    assert list(kept) == ["NCCL_SOCKET_IFNAME", "OMP_NUM_THREADS", "SLURM_JOB_ID", "WANDB_MODE"]
    assert "secret" not in json.dumps(snapshot(environment, ["train"], WORLD))


def test_credentials_in_addresses_are_cut_out_and_tokenizers_is_no_token():
    kept = kept_variables({"HF_ENDPOINT": "https://me:secret@hub.example/x", "TOKENIZERS_PARALLELISM": "false"})
    assert kept == {"HF_ENDPOINT": "https://hub.example/x", "TOKENIZERS_PARALLELISM": "false"}
    command = snapshot({}, ["train", "data.path=https://me:secret@host/x"], WORLD)["command"]
    assert command[-1] == "data.path=https://host/x"


def test_each_start_of_a_run_is_one_more_entry(tmp_path):
    path = tmp_path / "environment.json"
    for _ in range(2):
        write_snapshot(path, WORLD)
    first, second = json.loads(path.read_text())
    assert first["world_size"] == second["world_size"] == 2
    assert (
        first["packages"]["torch"] == torch.__version__.split("+")[0] or first["packages"]["torch"] == torch.__version__
    )


@pytest.fixture
def repository(tmp_path):
    (tmp_path / "train" / "record").mkdir(parents=True)
    (tmp_path / "train" / "record" / "snapshot.py").write_text("one = 1\n")
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    return tmp_path


def test_the_commit_is_told_and_whether_files_differ_from_it(repository):
    head = subprocess.run(
        ["git", "-C", str(repository), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    )
    found = code_version(repository)
    assert (found["commit"], found["dirty"]) == (head.stdout.strip(), False)
    (repository / "train" / "record" / "snapshot.py").write_text("one = 2\n")
    assert code_version(repository)["dirty"] is True


def test_an_installed_package_does_not_take_the_commit_of_the_repository_around_it(repository):
    (repository / "site-packages").mkdir()
    assert code_version(repository / "site-packages")["commit"] is None
