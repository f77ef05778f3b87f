"""`accelerate launch` without its traceback: what went wrong in a rank was already said there, and is said once."""

from __future__ import annotations

import logging
import signal
import sys

from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from conf.cli import USER_ERROR_CODE


def main() -> None:
    arguments = launch_command_parser().parse_args()
    # torch's elastic agent reports each failed rank at length; here it is one line.
    logging.disable(logging.ERROR)
    try:
        launch_command(arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode == USER_ERROR_CODE:
            sys.exit(USER_ERROR_CODE)
        print(f"error: rank {rank} {_ending(failure.exitcode)}; what it said is above.", file=sys.stderr)
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)


def _ending(exitcode: int) -> str:
    if exitcode < 0:
        return f"was ended by {signal.Signals(-exitcode).name}"
    return f"ended with exit code {exitcode}"


if __name__ == "__main__":
    main()
