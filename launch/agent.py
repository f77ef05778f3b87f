"""`accelerate launch` for runs that may be interrupted: ranks get the user's signals, the user gets their errors.

torch's elastic agent would answer SIGTERM by ending the ranks within 30 s, and would restart a run that was preempted or
that has an error in its configuration. Here the ranks decide when to end, and only failures are restarted.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any

from train.faults.preempt import end_when_asked

if __name__ == "__main__":
    end_when_asked()
    # As in `train.__main__`: until `main`, nothing becomes garbage.
    gc.disable()

import torch.distributed.launcher.api as launcher
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from conf.cli import USER_ERROR_CODE
from conf.streams import keep_writing
from launch.ahead import read_arguments
from train.faults.preempt import SIGNALS as PASSED_ON
from train.faults.process import AGENT, collect_again
from train.faults.stop import PREEMPTED_CODE

FINAL_CODES = (USER_ERROR_CODE, PREEMPTED_CODE)


class PassingAgent(LocalElasticAgent):
    """torch's elastic agent, except that it knows its ranks' process ids and restarts a run only if that can help."""

    current: PassingAgent | None = None
    is_asked_to_stop = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        PassingAgent.current = self

    def _monitor_workers(self, worker_group: Any) -> Any:
        result = super()._monitor_workers(worker_group)
        if result.is_failed():
            show_error(result.failures)
        if result.is_failed() and (
            self.is_asked_to_stop or any(failure.exitcode in FINAL_CODES for failure in result.failures.values())
        ):
            self._remaining_restarts = 0
        return result

    def pids(self) -> list[int]:
        """Return the process ids of the ranks on this machine; none before they are started."""
        return list(self._pcontext.pids().values()) if self._pcontext is not None else []


def main() -> None:
    """Start the ranks, wait for them, and exit with the code that the user is to see."""
    collect_again()
    keep_writing()
    arguments = launch_command_parser().parse_args(read_arguments(sys.argv[1:]))
    # torch's elastic agent reports each failed rank at length; here it is one line.
    logging.disable(logging.ERROR)
    os.environ[AGENT] = str(os.getpid())
    # torch's option parser reads this variable: torch's agent handles these signals, so that we can handle the others.
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGHUP,SIGQUIT"
    launcher.LocalElasticAgent = PassingAgent  # type: ignore[misc]
    for number in PASSED_ON:
        signal.signal(number, pass_on)
    try:
        launch_command(arguments)
    except ChildFailedError as error:
        rank, failure = first_failure(error.failures)
        if PassingAgent.is_asked_to_stop and failure.exitcode in (PREEMPTED_CODE, *(-number for number in PASSED_ON)):
            sys.exit(PREEMPTED_CODE)
        if failure.exitcode in FINAL_CODES:
            sys.exit(failure.exitcode)
        print(f"error: rank {rank} on {socket.gethostname()} {_ending(failure)}", file=sys.stderr)
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)


def pass_on(number: int, _frame: FrameType | None) -> None:
    """Pass a signal to every rank and keep waiting; if there are no ranks yet, exit."""
    PassingAgent.is_asked_to_stop = True
    pids = PassingAgent.current.pids() if PassingAgent.current is not None else []
    if not pids:
        sys.exit(PREEMPTED_CODE)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def first_failure(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """Return the rank to report: the first one that left an error, or if none did, the one that ended first."""
    rank = min(failures, key=lambda rank: (not _said(failures[rank]), failures[rank].timestamp, rank))
    return rank, failures[rank]


def show_error(failures: Mapping[int, ProcessFailure]) -> None:
    """Print the traceback of one failed rank, if any left one: usually all raised the same error."""
    _, failure = first_failure(failures)
    if said := _said(failure):
        # A progress bar may have left the cursor in the middle of a line.
        print("\n" + said["extraInfo"]["py_callstack"].rstrip(), file=sys.stderr, flush=True)


def _said(failure: ProcessFailure) -> dict[str, Any]:
    return failure.message if isinstance(failure.message, dict) else {}


def _ending(failure: ProcessFailure) -> str:
    if said := _said(failure):
        return f"failed: {' '.join(str(said['message']).split())}"
    if failure.exitcode < 0:
        return f"was killed by {signal.Signals(-failure.exitcode).name}; see its output above."
    return f"ended with exit code {failure.exitcode}; see its output above."


if __name__ == "__main__":
    main()
