"""An unexpected error is shown once, with its rank, even if all ranks have it."""

from __future__ import annotations

import json
import os
import signal
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

from launch.agent import first_failure, show_error
from tests.commands import ROOT, errors_in, run_command
from tests.test_run import tiny, write_text
from train.faults.error import hand_over
from train.faults.preempt import start_unheeding

MISTAKE = """
import os
if "RANK" in os.environ and "TORCHELASTIC_RUN_ID" in os.environ:
    from train import losses

    def add(self, step, loss, add=losses.StepLosses.add):
        if step == 2 and os.environ["RANK"] in os.environ["WRONG_RANKS"]:
            raise KeyError("a mistake in two\\nlines")
        return add(self, step, loss)

    losses.StepLosses.add = add
"""


@pytest.mark.parametrize("ranks", ["1", "01"])
def test_a_mistake_of_the_program_is_one_traceback_and_one_line_with_the_rank(ranks, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(MISTAKE)
    write_text(tmp_path / "text.jsonl")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = run_command(["launch", *tiny(tmp_path, "logger=none")], PYTHONPATH=path, WRONG_RANKS=ranks)
    assert done.returncode == 1
    assert done.stderr.count("Traceback (most recent call last)") == 1
    errors = errors_in(done.stderr)
    assert len(errors) == 1, done.stderr
    rank = "0" if "0" in ranks else "1"
    assert errors[0].startswith(f"error: rank {rank} on ")
    assert errors[0].endswith(r"failed: KeyError: 'a mistake in two\nlines'")
    assert done.stderr.rstrip().endswith(errors[0])


def failure(message, timestamp: int, exitcode: int = 1):
    return SimpleNamespace(message=message, timestamp=timestamp, exitcode=exitcode)


def test_the_first_rank_with_an_error_of_its_own_is_named_not_one_that_lost_it(capsys):
    said = {"message": "KeyError: 1", "extraInfo": {"py_callstack": "Traceback\nKeyError: 1\n", "timestamp": "7"}}
    failures = {0: failure("", 6), 2: failure(said, 8), 1: failure(said, 7)}
    assert first_failure(failures)[0] == 1
    show_error(failures)
    assert capsys.readouterr().err.count("KeyError: 1") == 1
    show_error({0: failure("", 6)})
    assert capsys.readouterr().err == ""


def test_without_an_agent_an_error_is_raised_as_ever(monkeypatch, tmp_path):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    assert not hand_over(KeyError("x"))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert hand_over(KeyError("x"))
    assert "KeyError" in json.loads((tmp_path / "error.json").read_text())["message"]["message"]


class Pids(torch.utils.data.Dataset[int]):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> int:
        time.sleep(0.2)
        return os.getpid()


def test_data_workers_outlive_the_signals_that_slurm_sends_to_every_process():
    seeded = []
    loader = DataLoader(Pids(), batch_size=1, num_workers=1, worker_init_fn=partial(start_unheeding, seeded.append))
    pids = []
    for batch in loader:
        pids.append(int(batch[0]))
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(pids[0], number) if len(pids) == 1 else None
    assert pids == [pids[0]] * 6
    assert pids[0] != os.getpid()
